"""Tools that several experiments share: records, figures, devices, compilers."""

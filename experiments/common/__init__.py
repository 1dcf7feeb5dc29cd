"""What several experiments share and no question is about: records, figures, devices, compilers."""

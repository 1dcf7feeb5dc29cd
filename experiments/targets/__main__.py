"""What would the layer cost on an H100 or a TPU? XLA's compilers answer, without the hardware.

The command compiles jbn beside flax.linen for devices that need not be there:

op         one layer, forward and backward in one program: BN, BN+ReLU, BN+add+ReLU, on shapes of
           ResNet-50 at batch 128
step       the whole training step of ResNet-50 (v1.5, batch 128, bfloat16, SGD with momentum): with
           jbn in the place of Flax's layer and no other change; with the ReLU and the addition in
           the layer; and with `jbn.checkpoint_policy` over the net and over every block

It counts kernels (steps of the program that launch something), bytes moved, temporaries, and the
seconds that compiling took here. Bytes are XLA's own count, "bytes accessed". For GPUs XLA has no
count: there the bytes are those of the operands and results of every kernel (`hlo.kernels`).

Claim: for GPUs and CPUs jbn moves no more bytes than Flax, except in the rows of checkpointing,
which save memory; for TPUs it moves 1.00 to 1.01 times as many.

Command::

    python -m experiments.targets --target h100               # five minutes on two CPU cores
    python -m experiments.targets --target v5e --part step    # 20 minutes and more
    python -m experiments.targets --target v5e --part op      # about two minutes
    python -m experiments.targets --target cpu --part step --batch 64 --dtype float32

Expected: see docs/performance.md. Compiling is timed once, on a machine that does other work, too.
"""

from experiments.targets.command import main

if __name__ == "__main__":
    main()

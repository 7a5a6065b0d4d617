"""The operations that everything runs on, each with a plain torch reference.

The modules here take and give tensors and know neither models nor files. `native.py` finds the compiled kernels for
CPUs; where they are there and take a tensor, they do the work, with the same bits; everywhere else the reference runs.
"""

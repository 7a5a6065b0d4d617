"""The kernels themselves, in Triton; imported when the first call is taken, since Triton need not be installed.

With `TRITON_INTERPRET=1` in the environment at that moment they are interpreted, on CPU tensors. All of them are
launched without fused multiply-adds (`launch.OPTIONS`): the numerics are separate roundings.
"""

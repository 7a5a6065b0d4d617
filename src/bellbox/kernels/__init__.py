"""The operations that everything runs on, each with a plain torch reference.

The modules here take and give tensors and know neither models nor files. Backends for particular machines
register themselves on the same operations; until one does, the reference runs.
"""

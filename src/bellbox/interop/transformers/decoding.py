def decode_in_short_steps(model):
    pass

from ..local_attention.triton import refuse

def forward(*a): raise NotImplementedError
backward = forward

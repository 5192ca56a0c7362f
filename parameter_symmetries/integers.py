"""Integer tensors, with stride 0 where they are constant, which saves memory and time; hashes."""

import math

import torch


def thin(t):
    """Return a tensor with the dimensions of stride 0 cut to size 1."""
    return t[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in t.stride())]


def varying(t):
    """Return the set of the dimensions along which the entries of a tensor differ."""
    t = thin(t)
    return {
        d for d, n in enumerate(t.shape) if n > 1 and not t.narrow(d, 0, 1).expand_as(t).equal(t)
    }


def compact(t):
    """Return a tensor with stride 0 in the dimensions along which it is constant."""
    dims = varying(t)
    return t[tuple(slice(None) if d in dims else slice(0, 1) for d in range(t.dim()))].expand_as(t)


def place(like, dims):
    """Return numbers that differ where the coordinates along `dims` do, of size 1 elsewhere."""
    sizes = [n if d in dims else 1 for d, n in enumerate(like.shape)]
    return torch.arange(math.prod(sizes), device=like.device).view(sizes)


def mix(*parts):
    """Return a hash of integers and integer tensors, entry by entry."""
    h = torch.zeros((), dtype=torch.int64)
    for part in parts:
        h = h + part
        for shift, odd in ((32, 0x2545F4914F6CDD1D), (29, 0x369DEA0F31A53F85)):
            h ^= h >> shift
            h *= odd
    return h ^ (h >> 32)


def fold(history, dims):
    """Return a hash of the entries along `dims` and of their order, of size 1 there."""
    history = thin(history)
    return mix(history, place(history, dims)).sum(dims, keepdim=True) if dims else mix(history)

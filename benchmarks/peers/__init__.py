"""Quiver beside its peers: the same model from the same files, the same texts, the same client, in turns.

peer        what a peer is            infinity, fastembed, …   one small file for each, with its requirements
places      what the peers serve      inside/                  what runs in their own environments
cells       what is asked             subject                  one peer while it runs: load, vectors, memory
measure     one peer's turn           exact                    cosines to the reference, and steady bits
results     what came out, resumable  report, plot             the page and its pictures

The files of peers import nothing but the standard library before `load` is called: they are read in their environments, too.
"""

"""torch's CUDA build without a GPU: NVIDIA's libraries replaced by one small library, compiled here by gcc.

`build` makes it: the CUDA calls by which torch asks for devices, streams and events are answered (driver.c), NCCL's
calls about communicators are written down and answered (nccl.c), every other symbol that torch needs exits the process
with its name. No kernel can run and nothing is sent. `launch` runs Python with it.
"""

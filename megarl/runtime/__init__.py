"""Processes on a machine: ranks, watchdog, interrupts, one event loop, the choice of CPU or CUDA."""

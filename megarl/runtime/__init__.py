"""The processes of a run: ranks, the watchdog, interrupts, an event loop, and the choice of CPU or CUDA."""

"""Benchmarks, most of them against other programs. They run with the process settings of vqmosaic's own commands."""

from vqmosaic.runs.process_settings import set_up_process

set_up_process()  # before torch is loaded

"""One thread a process: several of them on few cores would otherwise wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

"""Run under torchrun: the ranks as the launcher starts them, except that rank 1 hangs when it reads batch 8.

arguments: RUN_DIR ATTEMPT HOW
"""

import ctypes
import os
import sys
import threading
import time

from ernie_dist.__main__ import main
from ernie_dist.data.loader import BatchLoader


def hold_the_interpreter_lock() -> None:
    threading.Thread(target=ctypes.PyDLL(None).sleep, args=(1000,), daemon=True).start()


HOW = {"never comes": lambda: time.sleep(1000), "holds the lock": hold_the_interpreter_lock}

if __name__ == "__main__":
    hang, read = HOW[sys.argv.pop()], BatchLoader.__getitem__

    def read_or_hang(self, index):
        if index == 8 and os.environ["RANK"] == "1":
            hang()
        return read(self, index)

    BatchLoader.__getitem__ = read_or_hang
    sys.exit(main())

"""What `ray job submit` runs: `python jobs/annotate.py INPUT OUTPUT …`, with the options of `gem-ray annotate`.

Ray tells the job by `RAY_ADDRESS` which cluster it runs on. Unlike the command, a job in which some rows were rejected
ends with 0: it has done all that can be done, and Ray must not run it again.
"""

from __future__ import annotations

import sys

from gem_ray.cli import EXIT_REJECTED, main

if __name__ == "__main__":
    sys.argv.insert(1, "annotate")
    try:
        main()
    except SystemExit as end:
        if end.code != EXIT_REJECTED:
            raise

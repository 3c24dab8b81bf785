"""`gem-ray annotate` as a Ray job: `python jobs/annotate.py INPUT OUTPUT …`."""

import sys

from gem_ray.commands.options import same_command
from gem_ray.entrypoint import run_job

if __name__ == "__main__":
    run_job("annotate", stopped=f"stopped; run {same_command(sys.argv)} to resume")

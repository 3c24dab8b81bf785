"""`gem-ray annotate` as a Ray job: `python jobs/annotate.py INPUT OUTPUT …`."""

from gem_ray.entrypoint import run_job

if __name__ == "__main__":
    run_job("annotate", stopped="stopped; run the same command to resume")

"""`gem-ray experiment` as a Ray job: `python jobs/experiment.py NAME --data DIR --out DIR …`."""

from gem_ray.entrypoint import run_job

if __name__ == "__main__":
    run_job("experiment", stopped="stopped; run the same command to resume")

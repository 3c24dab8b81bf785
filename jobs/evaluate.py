"""`gem-ray evaluate` as a Ray job: `python jobs/evaluate.py GOLD PREDICTIONS …`."""

from gem_ray.entrypoint import run_job

if __name__ == "__main__":
    run_job("evaluate")

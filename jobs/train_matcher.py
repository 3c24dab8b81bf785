"""`gem-ray train matcher` as a Ray job: `python jobs/train_matcher.py --data DATA --out MODEL …`."""

from gem_ray.entrypoint import run_job

if __name__ == "__main__":
    run_job("train", "matcher")

"""`gem-ray train tagger` as a Ray job: `python jobs/train_tagger.py --data DATA --out MODEL …`."""

from gem_ray.entrypoint import run_job

if __name__ == "__main__":
    run_job("train", "tagger")

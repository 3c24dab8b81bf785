"""`gem-ray train text-segmenter` as a Ray job: `python jobs/train_text_segmenter.py --data DATA --out MODEL …`."""

from gem_ray.entrypoint import run_job

if __name__ == "__main__":
    run_job("train", "text-segmenter")

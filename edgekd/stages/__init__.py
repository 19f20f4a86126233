"""The stages of the pipeline, one file each; `Bench` holds what several of them need, loaded on first use."""

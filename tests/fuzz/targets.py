"""All targets of fuzzing."""

from tests.fuzz import datasets, images, pages, texts, weights, workdirs

TARGETS = [
    *images.TARGETS,
    *weights.TARGETS,
    *datasets.TARGETS,
    *texts.TARGETS,
    *workdirs.TARGETS,
    *pages.TARGETS,
]

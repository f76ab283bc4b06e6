"""Candidates in PyTorch: timm's models, eager and compiled, trained as its users train it."""

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from mixer_jax.benchmarks.candidates import OPTIMIZER, TIMM_COMPILED, Candidate, Workload
from mixer_jax.benchmarks.runner import CompileCosts, FrameworkRunner, Step

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TorchRunner(FrameworkRunner):
    """PyTorch on the first GPU, or on all cores of the CPU."""

    def __init__(self, workload: Workload, platform: str):
        super().__init__(workload, asynchronous=platform == "gpu")
        self.device = torch.device("cuda" if self.asynchronous else "cpu")
        self.dtype = _DTYPES[workload.dtype]
        # JAX's default in float32, too.
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        if hasattr(os, "sched_getaffinity"):
            torch.set_num_threads(len(os.sched_getaffinity(0)))

    def build(
        self, candidate: Candidate, batch_sizes: Sequence[int]
    ) -> tuple[list[Step], CompileCosts]:
        """Builds and runs one step per batch size; returns the costs of the first."""
        import_timm()
        steps, costs = [], []
        for batch_size in batch_sizes:
            memory_bytes = None
            if self.asynchronous:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                allocated = torch.cuda.memory_allocated()
            step = self._make_step(candidate, batch_size)
            self.wait(None)
            start = time.perf_counter()
            self.wait(step())
            first_step_seconds = time.perf_counter() - start
            if self.asynchronous:
                memory_bytes = torch.cuda.max_memory_allocated() - allocated
            steps.append(step)
            costs.append(CompileCosts(None, first_step_seconds, memory_bytes))
        return steps, costs[0]

    def build_matmul(self) -> tuple[Step, int]:
        """Builds a matmul of random matrices."""
        size = 8192 if self.asynchronous else 4096
        left, right = (torch.randn(size, size, device=self.device).to(self.dtype) for _ in "ab")
        return lambda: left @ right, 2 * size**3

    def wait(self, value: Any) -> None:
        """Waits until the device is idle."""
        if self.asynchronous:
            torch.cuda.synchronize()

    def release_memory(self) -> None:
        """Returns the allocator's cached memory to the device."""
        if self.asynchronous:
            torch.cuda.empty_cache()

    def make_model(self) -> Any:
        """Creates timm's model on the device."""
        return create_timm_model(self.workload).to(self.device)

    def make_train_step(
        self, model: Any, forward: Callable[[Any], Any]
    ) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Makes the training step of a model, from images and labels to the loss.

        `forward` is the model itself or the model compiled.
        """
        not_decayed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
        kernels: list[Any] = []
        others: list[Any] = []
        for name, parameter in model.named_parameters():
            is_kernel = parameter.ndim > 1 and name not in not_decayed
            (kernels if is_kernel else others).append(parameter)
        optimizer = torch.optim.AdamW(
            [
                {"params": kernels, "weight_decay": OPTIMIZER.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=OPTIMIZER.learning_rate,
            betas=(OPTIMIZER.b1, OPTIMIZER.b2),
            eps=OPTIMIZER.eps,
            **({"fused": True} if self.asynchronous else {"foreach": True}),
        )
        num_classes = self.workload.num_classes
        autocast: Any = contextlib.nullcontext()
        if self.dtype != torch.float32:
            autocast = torch.autocast(self.device.type, self.dtype)
        model.train()

        def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            with autocast:
                logits = forward(normalize_images(images))
            targets = torch.nn.functional.one_hot(labels, num_classes).float()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                logits.float(), targets, reduction="none"
            )
            loss = loss.sum(dim=-1).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm, foreach=True)
            optimizer.step()
            return loss.detach()

        return step

    def _make_step(self, candidate: Candidate, batch_size: int) -> Step:
        workload, model = self.workload, self.make_model()
        shape = (batch_size, 3, workload.image_size, workload.image_size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
        labels = torch.randint(0, workload.num_classes, (batch_size,), device=self.device)
        if workload.mode == "infer":
            # Weights in the dtype of the computation, as usual for serving: half the bytes to read.
            model = model.to(self.dtype).eval()
        # Static shapes: one program per batch size, as with XLA.
        compiled = candidate.implementation == TIMM_COMPILED
        forward = torch.compile(model, dynamic=False) if compiled else model
        if workload.mode == "train":
            step = self.make_train_step(model, forward)
            return lambda: step(images, labels)

        @torch.inference_mode()
        def classify() -> torch.Tensor:
            return forward(normalize_images(images).to(self.dtype)).float()

        return classify


def normalize_images(images: torch.Tensor) -> torch.Tensor:
    """Maps pixels from 0…255 to [-1, 1], on their device."""
    return images.float() / 127.5 - 1.0


def import_timm() -> ModuleType:
    """Imports timm with its models and transforms, next to any build of PyTorch."""
    try:
        import torchvision
    except RuntimeError:
        # torchvision's compiled operators load only with the build of PyTorch that they were made
        # for. At import it looks up just these two, which timm never calls.
        schemas = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
    import timm
    import timm.data
    import timm.models

    return timm


def create_timm_model(workload: Workload) -> Any:
    """Creates timm's model of a workload, randomly initialized, with timm's default GELU."""
    size = (workload.image_size, workload.image_size)
    model = (workload.variant, workload.config, size, workload.num_classes, "exact")
    # The expression is made from numbers and names of the family's own table.
    expression = workload.family.timm_expression(*model)
    return eval(expression, {"timm": import_timm()})  # nosec B307

"""The peer of PyTorch's world: timm's Mixer, eager and compiled, trained as its users do."""

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from mixer_jax.benchmarks.contestants import (
    B1,
    B2,
    CLIP_NORM,
    COMPILED,
    EPS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Contestant,
    Setting,
)
from mixer_jax.benchmarks.side import Costs, Program, Side
from mixer_jax.benchmarks.timm_library import create_timm_mixer, import_timm

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TorchSide(Side):
    """PyTorch on the first GPU, or on all cores of the CPU."""

    def __init__(self, setting: Setting, platform: str):
        super().__init__(setting, asynchronous=platform == "gpu")
        self.device = torch.device("cuda" if self.asynchronous else "cpu")
        self.dtype = _DTYPES[setting.dtype]
        # As JAX does by default in float32.
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.set_num_threads(count_cores())

    def facts(self) -> dict[str, str]:
        """Returns the device and the versions."""
        device = torch.cuda.get_device_name() if self.asynchronous else "cpu"
        return {
            "device": device,
            "torch": torch.__version__,
            "timm": import_timm().__version__,
        }

    def make(self, contestant: Contestant, alone: bool) -> tuple[Program, Costs]:
        """Makes a contestant's program and takes its first step."""
        import_timm()
        before = self._reset_memory()
        step, one = self._make_step(contestant, self.setting.batch_size), None
        self.wait(None)
        start = time.perf_counter()
        self.wait(step())
        costs = Costs(None, time.perf_counter() - start, self._memory_since(before))
        if alone:
            one = self._make_step(contestant, 1)
            self.wait(one())
        return Program(step, one), costs

    def make_product(self) -> tuple[Program, int]:
        """Makes a matrix product of random numbers."""
        side = 8192 if self.asynchronous else 4096
        left, right = (torch.randn(side, side, device=self.device).to(self.dtype) for _ in "ab")
        return Program(lambda: left @ right, None), 2 * side**3

    def wait(self, value: Any) -> None:
        """Waits until the device has done all."""
        if self.asynchronous:
            torch.cuda.synchronize()

    def rest(self) -> None:
        """Gives back what the allocator keeps."""
        if self.asynchronous:
            torch.cuda.empty_cache()

    def make_model(self) -> Any:
        """Returns timm's model on the device."""
        setting = self.setting
        model = create_timm_mixer(setting.variant, setting.image_size, setting.num_classes)
        return model.to(self.device)

    def make_batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Makes random images and labels on the device."""
        setting = self.setting
        shape = (count, 3, setting.image_size, setting.image_size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
        labels = torch.randint(0, setting.num_classes, (count,), device=self.device)
        return images, labels

    def training(
        self, model: Any, forward: Callable[[Any], Any]
    ) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Returns the training step, from images and labels to the loss.

        Args:
            model: whose parameters are trained.
            forward: of the model, compiled or not.
        """
        kernels = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [
                {"params": kernels, "weight_decay": WEIGHT_DECAY},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=LEARNING_RATE,
            betas=(B1, B2),
            eps=EPS,
            **({"fused": True} if self.asynchronous else {"foreach": True}),
        )
        classes = self.setting.num_classes
        model.train()

        def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            with self._precision():
                logits = forward(to_model_range(images))
            targets = torch.nn.functional.one_hot(labels, classes).float()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                logits.float(), targets, reduction="none"
            )
            loss = loss.sum(dim=-1).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM, foreach=True)
            optimizer.step()
            return loss.detach()

        return step

    def _make_step(self, contestant: Contestant, count: int) -> Callable[[], Any]:
        model = self.make_model()
        images, labels = self.make_batch(count)
        if self.setting.mode == "train":
            step = self.training(model, self._compiled(model, contestant))
            return lambda: step(images, labels)
        # Half the bytes to read: what those who serve such models do.
        model = model.to(self.dtype).eval()
        forward = self._compiled(model, contestant)

        @torch.inference_mode()
        def classify() -> torch.Tensor:
            return forward(to_model_range(images).to(self.dtype)).float()

        return classify

    def _compiled(self, model: Any, contestant: Contestant) -> Callable[[Any], Any]:
        if contestant.kind != COMPILED:
            return model
        # Not dynamic: a program for each size, as XLA makes.
        return torch.compile(model, dynamic=False)

    def _precision(self) -> Any:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _reset_memory(self) -> int:
        if not self.asynchronous:
            return 0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def _memory_since(self, before: int) -> int | None:
        return torch.cuda.max_memory_allocated() - before if self.asynchronous else None


def count_cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """Maps pixels 0…255 to [-1, 1], on the device."""
    return images.float() / 127.5 - 1.0

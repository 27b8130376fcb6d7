import ast
from pathlib import Path

import moejax

ROOT = Path(moejax.__file__).parent
FLOORS = {
    **dict.fromkeys(("config", "varying"), 0),
    **dict.fromkeys(("config_source", "mesh", "kernels"), 1),
    "ops": 2,
    **dict.fromkeys(("model", "data", "checkpoint"), 3),
    "pipeline": 4,
    **dict.fromkeys(("serve", "train", "report"), 5),  # these may import each other: a run draws and samples
    **dict.fromkeys(("plan", "launch"), 6),
    **dict.fromkeys(("commands", "notebook"), 7),
    **dict.fromkeys(("cli", "__init__", "__main__"), 8),
}


def test_imports_go_down_the_floors():
    wrong = []
    for path in ROOT.rglob("*.py"):
        part = path.relative_to(ROOT).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for target in (name.split(".")[1] for name in names if name.startswith("moejax.")):
                level = FLOORS[part], FLOORS[target]
                if target != part and level[0] <= level[1] and level != (5, 5) and part not in ("__init__", "__main__"):
                    wrong.append(f"{path.relative_to(ROOT)} imports moejax.{target}")
    assert not wrong, "\n".join(wrong)

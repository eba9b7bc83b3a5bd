"The door of similarity: every public name, and nothing heavy on the way (hiermetric.similarity)"

import ast, subprocess, sys
from pathlib import Path
import hiermetric.similarity

FOLDER = Path(hiermetric.similarity.__file__).parent


def public():
    "Module and name of all that the chapters export"
    for path in sorted(FOLDER.glob('[!_]*.py')):
        for n in ast.parse(path.read_text(encoding='utf-8')).body:
            if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == '__all__':
                yield from ((path.stem, name) for name in ast.literal_eval(n.value))


def test_every_public_name_has_a_door():
    names = list(public())
    assert names and sorted(n for _, n in names) == sorted(hiermetric.similarity.__all__)
    for module, name in names:
        assert getattr(hiermetric.similarity, name) is getattr(sys.modules[f'hiermetric.similarity.{module}'], name)


def test_the_door_is_light():
    code = (
        'import sys; from hiermetric import similarity; dir(similarity); '
        "print([m for m in ('torch', 'pandas', 'matplotlib', 'numpy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == '[]'

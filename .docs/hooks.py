"""Links between files of the repository become links between pages; pictures are copied; other files are only named."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {  # file of the repository -> page
    'README.md': 'index.md',
    'CONTRIBUTING.md': 'contributing.md',
    'recipes/README.md': 'recipes.md',
    'recipes/bench/README.md': 'bench.md',
    'recipes/paper/RESULTS.md': 'paper.md',
    'recipes/robust/RESULTS.md': 'robust.md',
    'recipes/twins/RESULTS.md': 'twins.md',
    'hub_cards/README.md': 'leaderboard.md',
    'timm_batchout/training/config.py': 'api.md',
}
LINK = re.compile(r'(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)\s#]+)(#[^)]*)?\)')
INCLUDED = re.compile(r'--8<-- "([^"]+)"')


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    included = INCLUDED.search(markdown)
    if not included:
        return markdown
    source = included.group(1)

    def replaced(match: re.Match[str]) -> str:
        picture, text, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if picture:
            return f'![{text}](files/{path})'
        if path in PAGES:
            return f'[{text}]({PAGES[path]}{anchor or ""})'
        return text if text.startswith('`') else f'`{text}`'

    return INCLUDED.sub('', markdown, count=1) + LINK.sub(replaced, (ROOT / source).read_text())


def on_files(files: Any, config: Any) -> Any:
    for page in PAGES:
        for picture, _, target, _ in LINK.findall((ROOT / page).read_text()) if page.endswith('.md') else ():
            if picture:
                path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
                files.append(File.generated(config, f'files/{path}', abs_src_path=str(ROOT / path)))
    return files

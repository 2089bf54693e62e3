"""The page of docs/web in headless Chromium, with onnxruntime-web from npm."""
import base64
import functools
import http.server
import io
import json
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from elsa_models import export_onnx

PAGE = Path(__file__).parents[1] / 'docs' / 'web' / 'index.html'
DROP = '''([data]) => {
    const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0)), transfer = new DataTransfer();
    transfer.items.add(new File([bytes], 'image.png', {type: 'image/png'}));
    document.querySelector('#drop').dispatchEvent(new DragEvent('drop', {dataTransfer: transfer, cancelable: true}));
}'''


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.mark.slow
@pytest.mark.browser
def test_page_classifies_a_dropped_image(tmp_path):
    from PIL import Image
    from playwright.sync_api import sync_playwright

    names = ['cat', 'dog', 'Maus ü']
    model = timm.create_model('test_elsa_swin', num_classes=3).eval()
    torch.nn.init.normal_(model.head.fc.weight, std=.3)  # probabilities that differ
    site = tmp_path / 'site'
    site.mkdir()
    export_onnx(model, site / 'model.onnx', preprocess=True, label_names=names)
    (site / 'labels.json').write_text(json.dumps(names))
    shutil.copy(PAGE, site)
    subprocess.run(['npm', 'install', '--no-audit', '--no-fund', 'onnxruntime-web'], cwd=tmp_path, check=True)
    shutil.copytree(tmp_path / 'node_modules' / 'onnxruntime-web' / 'dist', site / 'dist')

    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)  # the model's size: no resizing
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, 'PNG')
    mean, std = (torch.tensor(model.pretrained_cfg[k]) for k in ('mean', 'std'))
    with torch.no_grad():
        logits = model(((torch.from_numpy(pixels) / 255 - mean) / std).permute(2, 0, 1)[None])
    probabilities, order = logits.softmax(-1)[0].sort(descending=True)

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(_Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with sync_playwright() as playwright:
            # a Chromium of the system, or the one of `playwright install chromium`
            browser = playwright.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox'])
            page = browser.new_page()
            page.goto(f'http://127.0.0.1:{server.server_port}/index.html')
            page.evaluate(DROP, [base64.b64encode(png.getvalue()).decode()])
            page.wait_for_function("document.querySelector('#result').textContent", timeout=120_000)
            lines = page.locator('#result li').all_text_contents()
            assert len(lines) == 3, page.locator('#result').text_content()
            browser.close()
    finally:
        server.shutdown()
    assert [line.partition(':')[0] for line in lines] == [names[i] for i in order]
    for line, p in zip(lines, probabilities, strict=True):
        assert abs(float(line.partition(':')[2].removesuffix('%')) - 100 * p) < .11

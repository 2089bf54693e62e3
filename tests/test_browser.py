"""The page of docs/web: its preparation of pictures, in Node; all of it in headless Chromium, with onnxruntime-web."""
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
from helpers import drawn_picture
from timm.data import create_transform, resolve_model_data_config

from elsa_models import export_onnx

WEB = Path(__file__).parents[1] / 'docs' / 'web'
PREPARE = '''
const {cases, file} = JSON.parse(require('fs').readFileSync(0));
const found = cases.map(c => Array.from(prepare(c.rgba, c.height, c.width, c.wanted, c.config)));
console.log(JSON.stringify({found, described: describe(new Uint8Array(file))}));
'''
DROP = '''([data]) => {
    const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0)), transfer = new DataTransfer();
    transfer.items.add(new File([bytes], 'image.png', {type: 'image/png'}));
    document.querySelector('#drop').dispatchEvent(new DragEvent('drop', {dataTransfer: transfer, cancelable: true}));
}'''


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.mark.skipif(shutil.which('node') is None, reason='needs Node')
def test_page_prepares_pictures_as_timm_does():
    import onnx
    cases, expected = [], []
    for (width, height), wanted, mode, interpolation, channels in (
            ((100, 61), (64, 64), 'center', 'bicubic', 3), ((65, 201), (64, 64), 'center', 'bilinear', 1),
            ((100, 61), (48, 80), 'center', 'lanczos', 3), ((61, 100), (48, 80), 'squash', 'bicubic', 3),
            ((100, 61), (64, 64), 'border', 'bilinear', 3), ((40, 50), (64, 64), 'border', 'nearest', 1),
            ((3, 1), (32, 32), 'center', 'bicubic', 3)):
        picture = drawn_picture(height, width)
        config = dict(
            input_size=(channels, *wanted), interpolation=interpolation, mean=(0.5, 0.3, 0.2)[:channels],
            std=(0.5,) * channels, crop_pct=0.9, crop_mode=mode)
        rgba = np.asarray(picture.convert('RGBA')).flatten().tolist()
        cases.append(dict(rgba=rgba, height=height, width=width, wanted=wanted, config=config))
        transformed = create_transform(**config, use_prefetcher=True)(picture.convert('L' if channels == 1 else 'RGB'))
        expected.append(np.moveaxis(np.asarray(transformed), 0, -1).flatten())
    names = ['a', 'Maus ü']
    model = onnx.ModelProto(ir_version=10)  # written in parts, as export_onnx does
    model.graph.initializer.add(name='w', raw_data=bytes(300))
    described = onnx.ModelProto()
    for key, value in (('data_config', config), ('img_size', wanted), ('label_names', names)):
        described.metadata_props.add(key=key, value=json.dumps(value))
    file = list(model.SerializeToString() + described.SerializeToString() + model.SerializeToString())
    script = (WEB / 'prepare.js').read_text(encoding='utf-8') + PREPARE
    out = subprocess.run(
        ['node', '-e', script], input=json.dumps(dict(cases=cases, file=file)), capture_output=True, text=True,
        check=True)
    answer = json.loads(out.stdout)
    assert answer['described'] == json.loads(json.dumps(dict(config=config, size=wanted, names=names)))
    for found, e, case in zip(answer['found'], expected, cases, strict=True):
        # Pillow counts in whole numbers; which of its two passes is first depends on its version
        difference = np.abs(np.array(found) - e.astype(int))
        assert difference.max() <= 2 and difference.mean() < 0.2, case['config']


@pytest.mark.slow
@pytest.mark.browser
def test_page_classifies_a_dropped_image(tmp_path):
    from playwright.sync_api import sync_playwright

    names = ['cat', 'dog', 'Maus ü']
    model = timm.create_model('test_elsa_swin', num_classes=3).eval()
    torch.nn.init.normal_(model.head.fc.weight, std=.3)  # probabilities that differ
    site = tmp_path / 'site'
    site.mkdir()
    export_onnx(model, site / 'model.onnx', preprocess=True, label_names=names)
    (site / 'labels.json').write_text(json.dumps(names))
    for file in WEB.iterdir():
        shutil.copy(file, site)
    subprocess.run(['npm', 'install', '--no-audit', '--no-fund', 'onnxruntime-web'], cwd=tmp_path, check=True)
    shutil.copytree(tmp_path / 'node_modules' / 'onnxruntime-web' / 'dist', site / 'dist')

    picture, png = drawn_picture(75, 100), io.BytesIO()
    picture.save(png, 'PNG')
    config = resolve_model_data_config(model)
    with torch.no_grad():
        logits = model(create_transform(**config)(picture)[None])
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
            page.wait_for_function("!document.querySelector('#choose').disabled")
            lines = page.locator('#result li').all_text_contents()
            assert len(lines) == 3, page.locator('#state').text_content()
            assert page.locator('#picture').is_visible() and page.locator('#choose').is_enabled()
            browser.close()
    finally:
        server.shutdown()
    assert [line.partition(':')[0] for line in lines] == [names[i] for i in order]
    for line, p in zip(lines, probabilities, strict=True):
        assert abs(float(line.partition(':')[2].removesuffix('%')) - 100 * p) < .3

// From a picture and an ONNX file of export_onnx(preprocess=True) to the bytes that its model takes, as timm's
// transform of evaluation makes them with Pillow. index.html uses it; there is nothing of the browser in it.
'use strict';

/** The fields of a protobuf message: number, start and end of each that has a length. */
function* fieldsOf(bytes, start = 0, end = bytes.length) {
  let place = start;
  const varint = () => {
    let value = 0, factor = 1, byte;
    do {
      byte = bytes[place++];
      value += (byte & 127) * factor;
      factor *= 128;
    } while (byte & 128);
    return value;
  };
  while (place < end) {
    const key = varint(), kind = key % 8;
    if (kind === 0) varint();
    else if (kind === 1) place += 8;
    else if (kind === 5) place += 4;
    else if (kind === 2) {
      const length = varint();
      yield [Math.floor(key / 8), place, place + length];
      place += length;
    } else throw new Error('model.onnx is no ONNX file.');
  }
}

/** What an ONNX file says of its model: pictures, classes and so on. */
function describe(bytes) {
  const text = new TextDecoder(), described = {};
  for (const [field, start, end] of fieldsOf(bytes)) {
    if (field !== 14) continue;  // metadata_props, a key and a value each
    const [key, value] = [...fieldsOf(bytes, start, end)].map(([, a, b]) => text.decode(bytes.subarray(a, b)));
    described[key] = value;
  }
  if (described.resize_from) throw new Error('model.onnx crops pictures of one size itself: export it without --resize-from.');
  if (!described.data_config) throw new Error('model.onnx does not say how pictures are prepared, as files of export_onnx do.');
  return {
    config: JSON.parse(described.data_config),
    size: JSON.parse(described.img_size),
    names: JSON.parse(described.label_names || 'null'),
  };
}

const FILTERS = {  // how far each reaches, and its weights
  bilinear: [1, x => Math.max(0, 1 - Math.abs(x))],
  bicubic: [2, x => {
    x = Math.abs(x);
    return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
  }],
  lanczos: [3, x => {
    const sinc = y => y === 0 ? 1 : Math.sin(Math.PI * y) / (Math.PI * y);
    return Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0;
  }],
};

/** Where each of `count` pixels, from `first` on, of a line resized from `from` to `to` pixels looks, and its weights. */
function weightsOf(from, to, first, count, interpolation) {
  const scale = from / to;
  if (interpolation === 'nearest') {
    const places = [];
    for (let i = 0, center = scale * 0.5; i < first + count; i++, center += scale) places.push([Math.floor(center), [1]]);
    return places.slice(first);
  }
  return Array.from({length: count}, (_, i) => {
    const center = (first + i + 0.5) * scale;
    const [support, filter] = FILTERS[interpolation], stretch = Math.max(scale, 1);
    const start = Math.max(0, Math.trunc(center - support * stretch + 0.5));
    const end = Math.min(from, Math.trunc(center + support * stretch + 0.5));
    const weights = Array.from({length: end - start}, (_, j) => filter((start + j - center + 0.5) / stretch));
    const sum = weights.reduce((a, b) => a + b, 0);
    return [start, weights.map(w => w / sum)];
  });
}

/** One pass: lines of `pixels` (lines, from, channels) to (lines, places, channels). Bytes are rounded and clamped. */
function resample(pixels, lines, from, channels, places) {
  const out = new Uint8ClampedArray(lines * places.length * channels);
  for (let line = 0, o = 0; line < lines; line++) {
    for (const [start, weights] of places) {
      for (let c = 0; c < channels; c++) {
        let sum = 0;
        for (let j = 0, p = (line * from + start) * channels + c; j < weights.length; j++, p += channels) sum += weights[j] * pixels[p];
        out[o++] = sum;
      }
    }
  }
  return out;
}

function transpose(pixels, rows, columns, channels) {
  const out = new Uint8ClampedArray(pixels.length);
  for (let i = 0, p = 0; i < rows; i++) {
    for (let j = 0; j < columns; j++) for (let c = 0; c < channels; c++) out[(j * rows + i) * channels + c] = pixels[p++];
  }
  return out;
}

/** Height and width that a picture is resized to, before the middle is cut out of it. */
function resizedSize(height, width, wanted, {crop_pct, crop_mode}) {
  const [tall, wide] = wanted.map(side => Math.floor(side / crop_pct));
  if (crop_mode === 'squash') return [tall, wide];
  if (crop_mode !== 'border' && tall === wide) {
    return height < width ? [tall, Math.trunc(tall * width / height)] : [Math.trunc(wide * height / width), wide];
  }
  const ratio = (crop_mode === 'border' ? Math.max : Math.min)(height / tall, width / wide);
  return [Math.round(height / ratio), Math.round(width / ratio)];
}

/**
 * Bytes (height, width, channels) of a picture, resized and cropped as `config`, a data config of timm, says.
 * `rgba` are those of a canvas, and `wanted` is height and width of the result.
 */
function prepare(rgba, height, width, wanted, config) {
  const channels = config.input_size[0], pixels = new Uint8ClampedArray(height * width * channels);
  for (let i = 0, o = 0; i < rgba.length; i += 4) {
    if (channels === 3) for (let c = 0; c < 3; c++) pixels[o++] = rgba[i + c];
    else pixels[o++] = (19595 * rgba[i] + 38470 * rgba[i + 1] + 7471 * rgba[i + 2] + 32768) >> 16;
  }
  const [tall, wide] = resizedSize(height, width, wanted, config);
  // a half is rounded to the even number, as in Python
  const half = d => d < 0 ? -Math.floor(-d / 2) : d % 4 === 1 ? (d - 1) / 2 : Math.ceil(d / 2);
  const [top, left] = [half(tall - wanted[0]), half(wide - wanted[1])];
  const [y, x] = [Math.max(0, top), Math.max(0, left)];
  const rows = weightsOf(height, tall, y, Math.min(tall, wanted[0]), config.interpolation);
  const columns = weightsOf(width, wide, x, Math.min(wide, wanted[1]), config.interpolation);
  let picture = resample(pixels, height, width, channels, columns);
  picture = transpose(picture, height, columns.length, channels);
  picture = resample(picture, columns.length, height, channels, rows);
  picture = transpose(picture, columns.length, rows.length, channels);
  if (rows.length === wanted[0] && columns.length === wanted[1]) return new Uint8Array(picture);
  const out = new Uint8Array(wanted[0] * wanted[1] * channels);
  if (config.crop_mode === 'border') out.forEach((_, i) => { out[i] = Math.round(255 * config.mean[i % channels]); });
  for (let i = 0; i < rows.length; i++) {
    const line = picture.subarray(i * columns.length * channels, (i + 1) * columns.length * channels);
    out.set(line, ((i + Math.max(0, -top)) * wanted[1] + Math.max(0, -left)) * channels);
  }
  return out;
}

/** Probabilities of logits. */
function softmax(logits) {
  const most = Math.max(...logits), weights = Array.from(logits, x => Math.exp(x - most));
  const sum = weights.reduce((a, b) => a + b);
  return weights.map(w => w / sum);
}

/* A chart of the ticked runs on a canvas, with a second one above it for the cursor. */
class Chart {
  /* `curves`: columns of a run's rows, the first solid, the second dashed; `band`: the columns of
     the least and the greatest; `write`: a value in words. */
  constructor(id, curves, band, write) {
    Object.assign(this, {id, curves, band, write});
    const heads = ["", "soft", "soft key"].map(className => el("span", {className}));
    [this.name, this.unit, this.key] = heads;
    [this.base, this.over] = [el("canvas"), el("canvas")];
    this.tip = el("div", {className: "tip number", hidden: true});
    this.plot = el("div", {className: "plot", tabIndex: 0, role: "img"});
    this.plot.append(this.base, this.over, this.tip);
    this.node = el("figure", {id}, el("figcaption", {}, ...heads), this.plot);
    $("charts").append(this.node);
    this.plot.onpointermove = this.plot.onpointerdown = event => {
      const box = this.plot.getBoundingClientRect();
      if (this.range) point(this, this.value(event.clientX - box.left), event.clientY - box.top);
    };
    this.plot.onpointerleave = event => { if (event.pointerType === "mouse") point(null); };
    this.plot.onblur = () => point(null);
    this.plot.onkeydown = event => this.press(event);
    new ResizeObserver(redraw).observe(this.plot);
  }

  press(event) {
    const way = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (event.key === "Escape") point(null);
    if (!way || !this.range) return;
    event.preventDefault();
    const [low, high] = this.range.x, part = (high - low) / 100;
    const step = x === "epochs" ? Math.max(1, Math.round(part)) : part;
    const from = cursor ? cursor.at : way > 0 ? low - step : high + step;
    point(this, Math.min(high, Math.max(low, from + way * step)), 0);
  }

  /* The places of a run's rows, or of its steps, on the horizontal axis */
  places(run, steps) {
    if (x === "epochs") return steps ? run.steps.epoch : run.rows.epoch;
    return steps ? run.steps.epoch.map(epoch => clock(run, epoch)) : run.rows.seconds;
  }

  fit(some) {
    const log = this.id === "loss" && logarithmic(some);
    let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
    const see = (xs, ys) => {
      for (let i = 0; i < ys.length; i++) {
        const v = ys[i];
        if (xs[i] < x0) x0 = xs[i];
        if (xs[i] > x1) x1 = xs[i];
        if (v === null || log && v <= 0) continue;
        if (v < y0) y0 = v;
        if (v > y1) y1 = v;
      }
    };
    for (const run of some) {
      for (const name of [...this.curves, ...this.band]) see(this.places(run), run.rows[name]);
      see(this.places(run, true), run.steps[this.id]);
    }
    if (y0 > y1) [y0, y1] = log ? [1, 10] : [0, 1];
    if (log) {
      const room = Math.max(1.02, (y1 / y0) ** 0.04);
      [y0, y1] = [y0 / room, y1 * room];
    } else {
      const room = 0.05 * (y1 - y0) || 0.1 * Math.abs(y1) || 0.5;
      [y0, y1] = [this.id === "eta" ? Math.min(0, y0) : y0 - room, y1 + room];
      if (this.id === "acc") [y0, y1] = [Math.max(0, y0), Math.min(1, y1)];
    }
    if (x0 > x1) [x0, x1] = [0, 1];
    if (x0 === x1 || x === "seconds") x0 = Math.min(0, x0);
    if (x0 === x1) x1 = x0 + 1;
    this.range = {x: [x0, x1], y: [y0, y1], log};
  }

  value(px) {
    const {left, width} = this.box, [a, b] = this.range.x;
    return a + (b - a) * (px - left) / width;
  }
  px(v) {
    const {left, width} = this.box, [a, b] = this.range.x;
    return left + width * (v - a) / (b - a);
  }
  py(v) {
    const {top, height} = this.box, {y: [a, b], log} = this.range;
    return top + height * (1 - (log ? Math.log(v / a) / Math.log(b / a) : (v - a) / (b - a)));
  }

  /* A canvas as large as the plot, empty: [its pen, width, height] */
  cleared(canvas) {
    const ratio = devicePixelRatio || 1, {clientWidth: w, clientHeight: h} = this.plot;
    [canvas.width, canvas.height] = [Math.round(w * ratio), Math.round(h * ratio)];
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.font = "11px system-ui, sans-serif";
    pen.lineJoin = "bevel";  // round ones take several times as long
    return [pen, w, h];
  }

  draw(some) {
    const eta = run => run.rows.eta_mean.some(v => v !== null);
    this.node.hidden = this.id === "eta" && !some.some(eta);
    if (this.node.hidden) return;
    const texts = some.every(run => run.text), kinds = new Set(some.map(run => run.loss));
    const loss = kinds.size === 1 ? some[0].loss : "objective";
    const [name, unit] = {
      loss: texts && loss === "cross-entropy" ? ["loss", "nats a token"] : [loss, ""],
      acc: ["accuracy", texts ? "of the next token" : ""],
      eta: ["learning rate η", "mean, least to greatest"],
    }[this.id];
    put(this.name, name);
    put(this.unit, unit);
    const key = this.curves.length > 1 ? ["━ train", `╍ ${texts ? "validation" : "test"}`] : [];
    if (some.some(run => run.steps.epoch.length)) key.push("thin: each step");
    put(this.key, key.join("   "));
    this.fit(some);
    const pen = this.axes();
    const {left, top, width, height} = this.box;
    pen.beginPath();
    pen.rect(left, top - 3, width + 4, height + 6);
    pen.clip();
    for (const run of some) if (run.id !== focus) this.trace(pen, run, some.length);
    for (const run of some) if (run.id === focus) this.trace(pen, run, 1);
    const ends = some.slice(0, MOST).map(run => `${names.labels.get(run.id)}: ` +
      this.curves.map(name => this.write(run.last[name])).join(", "));
    this.plot.ariaLabel = `${name}, ${this.curves.length > 1 ? "train and test" : "mean"} ` +
      `after the last epoch of ${count(some.length, "run")}: ${ends.join("; ")}`;
  }

  axes() {
    const [pen, w, h] = this.cleared(this.base), {x: xs, y: ys, log} = this.range;
    const label = v => this.id === "acc" ? `${+(100 * v).toFixed(4)} %` : short(v);
    const rows = log ? logTicks(...ys) : ticks(...ys, h / 45);
    const left = 10 + Math.max(18, ...rows.map(v => pen.measureText(label(v)).width));
    const height = h - (x === "epochs" ? 48 : 34);
    this.box = {left, top: 10, width: Math.max(10, w - left - 12), height};
    const {width} = this.box, bottom = 10 + height;
    pen.strokeStyle = css("--grid");
    pen.fillStyle = css("--soft");
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    for (const v of rows) {
      const y = Math.round(this.py(v)) + 0.5;
      line(pen, [[left, y], [left + width, y]]);
      pen.fillText(label(v), left - 7, y);
    }
    pen.textBaseline = "top";
    pen.textAlign = "center";
    const [size, unit] = x === "epochs" ? [1, ""] : timeUnit(xs[1]);
    for (const v of ticks(xs[0] / size, xs[1] / size, width / 62, x === "epochs" ? 1 : 0)) {
      const at = this.px(v * size), text = `${short(v)} ${unit}`.trim();
      const half = pen.measureText(text).width / 2;
      line(pen, [[Math.round(at) + 0.5, bottom], [Math.round(at) + 0.5, bottom + 4]]);
      pen.fillText(text, Math.min(w - half - 1, Math.max(half, at)), bottom + 7);
    }
    if (x === "epochs") pen.fillText("epoch", left + width / 2, bottom + 23);
    return pen;
  }

  trace(pen, run, count) {
    const faint = focus && run.id !== focus ? 0.16 : 1, xs = this.places(run);
    pen.strokeStyle = pen.fillStyle = css(colour(run));
    const [low, high] = this.band.map(name => run.rows[name]);
    pen.globalAlpha = 0.17 * faint;
    if (low && count <= MOST) pieces(xs, low, (from, to) => {
      pen.beginPath();
      for (let i = from; i < to; i++) pen.lineTo(this.px(xs[i]), this.py(low[i]));
      for (let i = to - 1; i >= from; i--) pen.lineTo(this.px(xs[i]), this.py(high[i] ?? low[i]));
      pen.fill();
    });
    pen.globalAlpha = 0.4 * faint;
    pen.lineWidth = 1;
    this.curve(pen, this.places(run, true), run.steps[this.id]);
    pen.globalAlpha = faint;
    this.curves.forEach((name, i) => {
      pen.lineWidth = count > 2 * MOST ? 0.8 : i ? 1.5 : 1.8;
      pen.setLineDash(i ? [5, 4] : []);
      this.curve(pen, xs, run.rows[name], i ? "" : mark(run));
      pen.setLineDash([]);
    });
  }

  curve(pen, xs, ys, shape = "") {
    pieces(xs, ys, (from, to) => {
      const points = [];
      for (let i = from; i < to; i++) {
        const [a, b] = [this.px(xs[i]), this.py(ys[i])], [c, d] = points.at(-1) ?? [-9, -9];
        if (Math.abs(a - c) + Math.abs(b - d) > 1 || i === to - 1) points.push([a, b]);
      }
      line(pen, points);
      if (points.length === 1) dot(pen, ...points[0]);
      if (!shape) return;
      [pen.font, pen.textAlign, pen.textBaseline] = ["9px sans-serif", "center", "middle"];
      const each = Math.max(1, Math.floor(points.length / 5));
      for (let i = each >> 1; i < points.length; i += each) pen.fillText(shape, ...points[i]);
    }, this.range.log);
  }

  /* The line at the cursor, dots on the curves, and their values where the pointer is */
  point(some) {
    const [pen] = this.cleared(this.over);
    this.tip.hidden = true;
    if (!cursor || !this.range || this.node.hidden) return;
    const {left, top, width, height} = this.box, [low, high] = this.range.x;
    const at = Math.min(left + width, Math.max(left, this.px(cursor.at))), found = [];
    pen.strokeStyle = css("--soft");
    line(pen, [[at, top], [at, top + height]]);
    for (const run of some) {
      const xs = this.places(run), i = nearest(xs, cursor.at);
      if (cursor.at > xs[i] + (high - low) / 50 && i === xs.length - 1) continue;  // it has ended
      const values = this.curves.map(name => run.rows[name][i]);
      const ys = values.filter(v => v !== null && (v > 0 || !this.range.log)).map(v => this.py(v));
      if (!ys.length) continue;
      pen.fillStyle = css(colour(run));
      for (const y of ys) dot(pen, this.px(xs[i]), y);
      const away = Math.min(...ys.map(y => Math.abs(y - cursor.y)));
      found.push({run, i, values, away, y: ys.at(-1)});
    }
    if (cursor.chart === this && found.length) this.tell(found, some.length > 1, at);
  }

  tell(found, several, at) {
    const near = found.sort((a, b) => a.away - b.away).slice(0, MOST).sort((a, b) => a.y - b.y);
    const soft = text => words("span", text, "soft"), {run, i} = near[0];
    const row = cells => el("tr", {}, ...cells.map(cell => el("td", {}, cell)));
    const where = x === "epochs" ? `epoch ${run.rows.epoch[i]}` : span(cursor.at);
    const heads = this.band.length ? ["mean", "least – greatest"]
      : ["train", run.text ? "validation" : "test"];
    const rows = near.map(({run, i, values}) => {
      const name = several ? names.labels.get(run.id) : `after ${span(run.rows.seconds[i])}`;
      const cells = [el("span", {}, swatch(run), name), ...values.map(v => this.write(v))];
      const ends = this.band.map(column => this.write(run.rows[column][i])).join(" – ");
      return row(ends ? [...cells, ends] : cells);
    });
    if (found.length > MOST) rows.push(row([soft(`and ${found.length - MOST} farther away`)]));
    rows.unshift(row([words("b", where), ...heads.map(soft)]));
    this.tip.replaceChildren(el("table", {}, ...rows));
    this.tip.hidden = false;
    const room = this.plot.clientWidth, own = this.tip.offsetWidth;
    const left = at < room / 2 ? at + 14 : at - 14 - own;
    this.tip.style.left = `${Math.max(0, Math.min(room - own, left))}px`;
  }
}

const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
function line(pen, points) {
  pen.beginPath();
  for (const [a, b] of points) pen.lineTo(a, b);
  pen.stroke();
}
function dot(pen, a, b) {
  pen.beginPath();
  pen.arc(a, b, 2.8, 0, 7);
  pen.fill();
}
/* Call `each` with the ends of every stretch of values that can be drawn */
function pieces(xs, ys, each, log = false) {
  for (let from = 0, to; from < ys.length; from = to + 1) {
    for (to = from; to < ys.length && ys[to] !== null && (!log || ys[to] > 0); to++);
    if (to > from) each(from, to);
  }
}
/* The index of the value of a rising column that is nearest */
function nearest(xs, v) {
  let [low, high] = [0, xs.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < v) low = middle + 1; else high = middle;
  }
  return low && v - xs[low - 1] < xs[low] - v ? low - 1 : low;
}
/* The seconds of a run at a place within its epochs; beyond them it goes on as in the last one */
function clock(run, epoch) {
  const {epoch: epochs, seconds} = run.rows;
  let i = nearest(epochs, epoch);
  if (epochs[i] < epoch && i < epochs.length - 1) i++;
  const [e, s] = i ? [epochs[i - 1], seconds[i - 1]] : [0, 0];
  return s + (seconds[i] - s) * (epoch - e) / (epochs[i] - e || 1);
}

/* Round numbers, at 1, 2 or 5 times a power of ten from each other, `least` at least */
function ticks(low, high, count, least = 0) {
  const raw = Math.max((high - low) / Math.max(2, count), least);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find(n => n * power >= 0.999 * raw), found = [];
  for (let n = Math.ceil(low / step - 1e-9); n <= high / step + 1e-9; n++)
    found.push(+(n * step).toPrecision(12));
  return found;
}
function logTicks(low, high) {
  if (high / low < 8) return ticks(low, high, 6).filter(v => v > 0);
  const first = Math.floor(Math.log10(low)), decades = Math.log10(high) - first, found = [];
  for (let n = first; n <= first + decades; n += Math.max(1, Math.round(decades / 7)))
    for (const k of decades < 2.6 ? [1, 2, 5] : [1]) found.push(+(k * 10 ** n).toPrecision(3));
  return found.filter(v => v >= low && v <= high);
}
const UNITS = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
const timeUnit = seconds => UNITS.find(([size]) => seconds >= 2 * size) ?? UNITS[3];
const short = v => v && (Math.abs(v) < 1e-3 || Math.abs(v) >= 1e5)
  ? (+v.toPrecision(6)).toExponential().replace("e+", "e") : String(+v.toPrecision(6));

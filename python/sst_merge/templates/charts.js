"use strict";
// Vega specs of the page's charts. Colours are the page's own custom properties, so that light and dark are one definition.

const SHAPES = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right", "triangle-left"];
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const narrow = () => innerWidth <= 700;

/** Colour and shape of every series: no two have both alike. Ours and plain addition keep theirs on every page. */
function looks(series) {
  let next = 2;
  return new Map(series.map(s => {
    const slot = {ours: 0, plain: 1}[s.role] ?? next++;
    return [s.name, {colour: css(`--s${slot < 8 ? slot : 2 + (slot - 2) % 6}`), shape: SHAPES[(slot + Math.floor(slot / 8)) % 8]}];
  }));
}

const config = () => ({
  background: "transparent", font: css("--sans"),
  axis: {labelFont: css("--sans"), titleFont: css("--sans"), labelColor: css("--soft"), titleColor: css("--soft"), labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", titlePadding: 8, gridColor: css("--line"), domain: false, ticks: false, labelPadding: 6},
  text: {fontSize: 12, font: css("--sans")},
});

/** Ticks of a logarithmic axis: powers of ten, and three times these. */
const ticks = (low, high) => [-6, -5, -4, -3, -2, -1, 0, 1, 2].flatMap(e => [10 ** e, 3 * 10 ** e]).map(v => Number(v.toPrecision(1))).filter(v => v >= low && v <= high);
const log = (name, fields, range) => ({name, type: "log", range, nice: false, zero: false, domain: {fields}, padding: 26});

/** Refusal against benign KL: one line per series, error bars, the reference without the patch, labels beside the lines. */
function frontSpec({points, series, here}, before, measure, chosen) {
  const look = looks(series), names = series.map(s => s.name), nll = measure === "nll";
  const values = points.map((p, id) => ({...p, id})).filter(p => p.kl && p.kl.value > 0 && p[measure]).map(p => ({
    id: p.id, series: p.series, label: p.label, here: p.here, x: p.kl.value, xl: p.kl.low > 0 ? p.kl.low : p.kl.value, xh: p.kl.high ?? p.kl.value,
    y: p[measure].value, yl: p[measure].low ?? p[measure].value, yh: p[measure].high ?? p[measure].value,
    tip: {title: p.cells[0].text, refused: p.cells[1].text, "benign KL": p.cells[2].text},
  }));
  const floor = Math.min(...values.map(v => v.x)) / 4;  // intervals that reach to nothing
  for (const v of values) v.xl = Math.max(v.xl, floor);
  const x = {scale: "x", field: "x"}, y = {scale: "y", field: "y"}, colour = {scale: "colour", field: "series"};
  return {
    $schema: "https://vega.github.io/schema/vega/v6.json", description: "Refusal of harmful prompts against benign KL; the table below has the same numbers.",
    autosize: {type: "fit-x", contains: "padding"}, padding: 2, height: narrow() ? 320 : 400, config: config(),
    signals: [
      {name: "width", init: "containerSize()[0]", on: [{events: {source: "window", type: "resize"}, update: "containerSize()[0]"}]},
      {name: "shown", value: names}, {name: "chosen", value: chosen},
    ],
    data: [
      {name: "rows", values, transform: [{type: "filter", expr: "indexof(shown, datum.series) >= 0"}]},
      {name: "heads", source: "rows", transform: [
        {type: "window", groupby: ["series"], sort: {field: "x"}, ops: ["row_number"], as: ["rank"]},
        {type: "joinaggregate", groupby: ["series"], ops: ["count"], as: ["count"]},
        {type: "filter", expr: "datum.rank === ceil((datum.count + 1) / 2)"},
      ]},
      {name: "own", source: "rows", transform: [{type: "filter", expr: "datum.here"}]},
    ],
    scales: [
      {...log("x", [{data: "rows", field: "xl"}, {data: "rows", field: "xh"}], "width"), padding: narrow() ? 14 : 30},
      nll ? {name: "y", type: "linear", range: [0, {signal: "height"}], zero: false, padding: 16, domain: {fields: [{data: "rows", field: "yl"}, {data: "rows", field: "yh"}, [before ?? values[0]?.y ?? 0]]}}
          : {name: "y", type: "linear", range: "height", domain: [-0.03, 1.05]},
      {name: "colour", type: "ordinal", domain: names, range: names.map(n => look.get(n).colour)},
      {name: "shape", type: "ordinal", domain: names, range: names.map(n => look.get(n).shape)},
    ],
    axes: [
      {scale: "y", orient: "left", grid: true, tickCount: 5, values: nll ? undefined : [0, .25, .5, .75, 1], format: nll ? "~g" : ".0%", title: nll ? "NLL of refusals, nats per token (up refuses more)" : "harmful prompts refused"},
      {scale: "x", orient: "bottom", format: "~g", labelOverlap: true, values: ticks(floor, Infinity), title: "benign KL, nats per label token (left costs less)"},
    ],
    marks: [
      ...(before == null ? [] : [
        {type: "rule", aria: false, encode: {update: {x: {value: 0}, x2: {signal: "width"}, y: {scale: "y", value: before}, stroke: {value: css("--soft")}, strokeDash: {value: [3, 4]}}}},
        {type: "text", aria: false, encode: {update: {x: {signal: "width"}, y: {scale: "y", value: before}, dy: {value: -5}, align: {value: "right"}, fill: {value: css("--soft")}, text: {value: "without the patch"}}}},
      ]),
      {type: "rule", aria: false, from: {data: "rows"}, encode: {update: {x: {scale: "x", field: "xl"}, x2: {scale: "x", field: "xh"}, y, stroke: colour, opacity: {value: .35}}}},
      {type: "rule", aria: false, from: {data: "rows"}, encode: {update: {x, y: {scale: "y", field: "yl"}, y2: {scale: "y", field: "yh"}, stroke: colour, opacity: {value: .35}}}},
      {type: "group", name: "lines", aria: false, from: {facet: {name: "line", data: "rows", groupby: "series"}}, marks: [
        {type: "line", aria: false, from: {data: "line"}, sort: {field: "x"}, encode: {update: {x, y, stroke: colour, strokeWidth: {value: 1.6}, opacity: {value: .8}}}},
      ]},
      {type: "symbol", aria: false, from: {data: "own"}, encode: {update: {x, y, size: {value: 380}, stroke: {value: css("--ink")}, strokeWidth: {value: 1.2}, fill: {value: "transparent"}}}},
      {type: "symbol", name: "points", from: {data: "rows"}, encode: {
        enter: {tooltip: {field: "tip"}, cursor: {value: "pointer"}},
        update: {x, y, shape: {scale: "shape", field: "series"}, fill: colour, stroke: [{test: "datum.id === chosen", value: css("--ink")}, {value: css("--back")}],
          strokeWidth: [{test: "datum.id === chosen", value: 2.5}, {value: 1}], size: [{test: "datum.id === chosen", value: 150}, {value: 95}],
          description: {signal: "datum.tip.title + ': ' + datum.tip.refused + ' refused, benign KL ' + datum.tip['benign KL']"}},
      }},
      ...(here ? [{type: "text", name: "here", aria: false, interactive: false, from: {data: "own"}, encode: {update: {x, y, dy: {value: -17}, align: {value: "center"}, text: {value: here}, fontWeight: {value: 600}, fill: {value: css("--ink")}}}}] : []),
      {type: "symbol", name: "anchors", aria: false, interactive: false, from: {data: "heads"}, encode: {update: {x, y, size: {value: 120}, opacity: {value: 0}}}},
      {type: "text", name: "labels", aria: false, interactive: false, from: {data: "anchors"}, encode: {enter: {text: {field: "datum.series"}, fontSize: {value: 13}, fontWeight: {value: 600}, fill: {scale: "colour", field: "datum.series"}}},
        transform: [{type: "label", size: {signal: "[width, height]"}, avoidMarks: ["points", "lines", ...(here ? ["here"] : [])], anchor: ["left", "top-left", "right", "bottom-right", "top", "bottom"], offset: [6, 10, 16]}]},
    ],
  };
}

/** Measured against predicted KL, both logarithmic, with the line where they agree. */
function calibrationSpec(predictions) {
  const values = predictions.map(p => ({x: p.predicted, y: p.measured.value, yl: p.measured.low > 0 ? p.measured.low : p.measured.value, yh: p.measured.high ?? p.measured.value,
    tip: {title: p.label, predicted: p.predicted.toPrecision(2), measured: p.measured.value.toPrecision(2)}}));
  const all = values.flatMap(v => [v.x, v.yl, v.yh]).filter(v => v > 0), ends = [Math.min(...all) / 1.5, Math.max(...all) * 1.5];
  const x = {scale: "x", field: "x"}, y = {scale: "y", field: "y"}, axis = {format: "~g", grid: true, labelOverlap: true, values: ticks(...ends)};
  return {
    $schema: "https://vega.github.io/schema/vega/v6.json", description: "Measured against predicted benign KL; the table beside has the same numbers.",
    autosize: {type: "fit-x", contains: "padding"}, padding: 2, height: 260, config: config(),
    signals: [{name: "width", init: "containerSize()[0]", on: [{events: {source: "window", type: "resize"}, update: "containerSize()[0]"}]}],
    data: [{name: "points", values}, {name: "line", values: ends.map(v => ({v}))}],
    scales: [{name: "x", type: "log", range: "width", domain: ends, nice: false}, {name: "y", type: "log", range: "height", domain: ends, nice: false}],
    axes: [{scale: "x", orient: "bottom", ...axis, title: "predicted"}, {scale: "y", orient: "left", ...axis, title: "measured"}],
    marks: [
      {type: "line", aria: false, from: {data: "line"}, encode: {update: {x: {scale: "x", field: "v"}, y: {scale: "y", field: "v"}, stroke: {value: css("--soft")}, strokeDash: {value: [3, 4]}}}},
      {type: "text", aria: false, encode: {update: {x: {scale: "x", value: Math.sqrt(ends[0] * ends[1])}, y: {scale: "y", value: Math.sqrt(ends[0] * ends[1])}, dx: {value: 8}, dy: {value: 14}, fill: {value: css("--soft")}, text: {value: "as predicted"}}}},
      {type: "rule", aria: false, from: {data: "points"}, encode: {update: {x, y: {scale: "y", field: "yl"}, y2: {scale: "y", field: "yh"}, stroke: {value: css("--s0")}, opacity: {value: .4}}}},
      {type: "symbol", from: {data: "points"}, encode: {enter: {tooltip: {field: "tip"}}, update: {x, y, size: {value: 80}, fill: {value: css("--s0")}, stroke: {value: css("--back")}, description: {signal: "datum.tip.title + ': predicted ' + datum.tip.predicted + ', measured ' + datum.tip.measured"}}}},
    ],
  };
}

/** What was measured with its interval on a line from 0, and what was asked for; the shaded part is as asked. */
function budgetSpec({asked, measured, share, state}) {
  const colour = css({kept: "--good", unsure: "--warn", broken: "--bad", unmeasured: "--soft"}[state]), end = share ? 1 : Math.max(asked, measured.high ?? measured.value) * 1.15 || 1;
  const at = v => ({scale: "x", value: v}), text = (v, y, words, fill) => ({type: "text", aria: false, encode: {update: {x: at(v), y: {value: y}, align: {value: v > end / 2 ? "right" : "left"}, dx: {value: v > end / 2 ? -5 : 5}, fill: {value: fill}, text: {value: words}}}});
  return {
    $schema: "https://vega.github.io/schema/vega/v6.json", autosize: {type: "fit-x", contains: "padding"}, padding: 2, height: 52, config: config(),
    signals: [{name: "width", init: "containerSize()[0]", on: [{events: {source: "window", type: "resize"}, update: "containerSize()[0]"}]}],
    scales: [{name: "x", type: "linear", range: "width", domain: [0, end]}],
    axes: [{scale: "x", orient: "bottom", format: share ? ".0%" : "~g", tickCount: 3, labelFlush: true}],
    marks: [
      {type: "rect", aria: false, encode: {update: {x: at(share ? asked : 0), x2: at(share ? 1 : asked), y: {value: 0}, y2: {signal: "height"}, fill: {value: css("--line")}, opacity: {value: .7}}}},
      {type: "rule", aria: false, encode: {update: {x: at(asked), y: {value: 0}, y2: {signal: "height"}, stroke: {value: css("--ink")}, strokeWidth: {value: 1.5}}}},
      text(asked, 12, "asked", css("--ink")),
      ...(measured.low == null ? [] : [{type: "rule", aria: false, encode: {update: {x: at(measured.low), x2: at(measured.high), y: {value: 34}, stroke: {value: colour}, strokeWidth: {value: 4}, opacity: {value: .4}, strokeCap: {value: "round"}}}}]),
      {type: "symbol", aria: false, encode: {update: {x: at(measured.value), y: {value: 34}, size: {value: 90}, fill: {value: colour}, stroke: {value: css("--back")}}}},
    ],
  };
}

/** The shapes of the series' keys, 14 by 14. */
const KEYS = {
  circle: "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0Z", square: "M-4.5-4.5h9v9h-9Z", "triangle-up": "M0-5.5L5 4H-5Z", diamond: "M0-6L5 0L0 6L-5 0Z",
  "triangle-down": "M0 5.5L5-4H-5Z", cross: "M-2-6h4v4h4v4h-4v4h-4v-4h-4v-4h4Z", "triangle-right": "M5.5 0L-4 5V-5Z", "triangle-left": "M-5.5 0L4 5V-5Z",
};

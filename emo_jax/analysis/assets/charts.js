// ---- charts: heatmaps and graphs by ECharts, in the page's colours

const dark = matchMedia("(prefers-color-scheme: dark)");
const theme = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const blockColour = (block) => page.colours[block % page.colours.length];

// A box that draws itself as soon as it is in the page, again in other colours, and fits its width.
function chart(height, label, options, onclick) {
  const box = element("div.chart", { role: "img", "aria-label": label, "--height": height });
  let drawing;
  const draw = () =>
    drawing?.setOption({ animation: false, textStyle: { fontFamily: "system-ui, sans-serif" }, ...options() });
  const resize = new ResizeObserver(() => {
    if (drawing) return drawing.resize();
    drawing = echarts.init(box);
    draw();
    if (onclick) drawing.on("click", onclick);
  });
  resize.observe(box);
  dark.addEventListener("change", draw);
  box.dispose = () => {
    resize.disconnect();
    dark.removeEventListener("change", draw);
    drawing?.dispose();
  };
  return box;
}

const tooltip = (lines) => ({
  backgroundColor: theme("--card"),
  borderColor: theme("--line"),
  textStyle: { color: theme("--ink"), fontSize: 13 },
  confine: true,
  formatter: (point) =>
    element(
      "div",
      {},
      lines(point).map((line) => element("div", {}, line)),
    ),
});

function axis(names, title, more) {
  return {
    type: "category",
    data: names,
    name: title,
    nameLocation: "middle",
    nameTextStyle: { color: theme("--soft") },
    axisLine: { show: false },
    axisTick: { show: false },
    splitArea: { show: false },
    axisLabel: { color: theme("--soft"), fontSize: 11, hideOverlap: true, overflow: "truncate", ...more },
  };
}

// Rows × columns of `values`, coloured from range[0] to range[1]. `lines(row, column, value)` is the tooltip.
function heatmap({
  label,
  rows,
  columns,
  title = "",
  values,
  range,
  ramp = "rising",
  height,
  rotate = 0,
  lines,
  onclick,
}) {
  const wide = Math.min(Math.max(...rows.map((name) => name.length)) * 7 + 20, innerWidth > 720 ? 150 : 104);
  return chart(
    height,
    label,
    () => ({
      grid: { left: wide, right: 6, top: 6, bottom: rotate ? 84 : title ? 42 : 26 },
      xAxis: {
        ...axis(columns, title, { rotate, width: rotate ? 76 : undefined, interval: rotate ? 0 : "auto" }),
        nameGap: 24,
      },
      yAxis: { ...axis(rows, "", { width: wide - 12, interval: Math.ceil(rows.length / 32) - 1 }), inverse: true },
      tooltip: tooltip(({ data: [column, row] }) => lines(row, column, values[row * columns.length + column])),
      visualMap: { show: false, min: range[0], max: range[1], inRange: { color: theme(`--${ramp}`).split(", ") } },
      series: [
        {
          type: "heatmap",
          progressive: 0,
          data: Array.from(values, (value, n) => [
            n % columns.length,
            Math.floor(n / columns.length),
            Number.isNaN(value) ? "-" : Math.min(Math.max(value, range[0]), range[1]),
          ]),
          itemStyle: { borderColor: theme("--card"), borderWidth: columns.length > 48 ? 0 : 1 },
          emphasis: { itemStyle: { borderColor: theme("--ink"), borderWidth: 1 } },
        },
      ],
    }),
    onclick && (({ data: [column, row] }) => onclick(row, column)),
  );
}

// What the colours mean.
function scale(low, high, ramp) {
  return element("div.legend", {}, low, element("i.scale", { "--ramp": `var(--${ramp})` }), high);
}

// Experts on a circle, in their order, with a line for each of the strongest pairs.
function circle({ label, names, blocks, sizes, pairs, chosen, lines, onclick }) {
  const room = Math.min(1, 48 / names.length);
  return chart(
    "min(92vw, 440px)",
    label,
    () => ({
      tooltip: tooltip(lines),
      series: [
        {
          type: "graph",
          layout: "circular",
          circular: { rotateLabel: true },
          left: 44,
          right: 44,
          top: 44,
          bottom: 44,
          data: names.map((name, n) => ({
            name,
            value: sizes[n],
            symbolSize: room * (6 + 16 * Math.sqrt(sizes[n])),
            itemStyle: {
              color: blockColour(blocks[n]),
              borderColor: theme("--ink"),
              borderWidth: name === chosen ? 3 : 0,
            },
          })),
          links: pairs.map(({ from, to, value, strength, colour }) => ({
            source: from,
            target: to,
            value,
            lineStyle: { color: colour, width: 0.5 + 4 * room * strength, opacity: 0.25 + 0.5 * strength },
          })),
          label: { show: true, color: theme("--soft"), fontSize: names.length > 64 ? 8 : 11 },
          lineStyle: { curveness: 0.25 },
          emphasis: { focus: "adjacency" },
        },
      ],
    }),
    onclick && (({ dataType, name }) => dataType === "node" && onclick(name)),
  );
}

// Bundles entry.js into echarts.min.js, headed by the notices of what is in it: `make vendor`.
import { copyFileSync, readFileSync } from "node:fs";
import { buildSync } from "esbuild";

const read = (path) =>
  readFileSync(`node_modules/${path}`, "utf8")
    .replace(/\/\*!?|\*\/|\*{5,}/g, "")
    .trim();
const notices = [
  read("echarts/NOTICE"),
  `Version ${JSON.parse(read("echarts/package.json")).version}, bundled in part.`,
  "Licensed under the Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0",
  `== d3, of which ECharts holds parts\n${read("echarts/licenses/LICENSE-d3")}`,
  `== zrender\n${read("zrender/LICENSE")}`,
  `== tslib\n${read("tslib/CopyrightNotice.txt")}`,
];
buildSync({
  entryPoints: ["entry.js"],
  outfile: "echarts.min.js",
  banner: { js: `/*!\n${notices.join("\n\n")}\n*/` },
  bundle: true,
  minify: true,
  format: "iife",
  globalName: "echarts",
});
copyFileSync("node_modules/echarts/LICENSE", "LICENSE");

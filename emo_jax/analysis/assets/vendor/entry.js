// The parts of ECharts that the explorer draws with; `make vendor` bundles them into echarts.min.js.
import { init, use } from "echarts/core";
import { GraphChart, HeatmapChart } from "echarts/charts";
import { GridComponent, TooltipComponent, VisualMapContinuousComponent } from "echarts/components";
import { CanvasRenderer } from "echarts/renderers";

use([GraphChart, HeatmapChart, GridComponent, TooltipComponent, VisualMapContinuousComponent, CanvasRenderer]);

export { init };

// A dashboard as Grafana's published schema describes it, its panels with the options of their kind.

import type {
  Dashboard,
  FieldConfig,
  Panel,
  RowPanel,
} from "@grafana/schema/dist/types/raw/dashboard/x/dashboard_types.gen";
import type * as heatmap from "@grafana/schema/dist/types/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen";
import type * as stat from "@grafana/schema/dist/types/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen";
import type * as timeseries from "@grafana/schema/dist/types/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen";

/** The same as written in JSON: an enumeration is the text that it stands for, and nothing else may stand there. */
type Written<T> = T extends string
  ? `${T}`
  : T extends (infer Item)[]
    ? Written<Item>[]
    : T extends object
      ? { [Key in keyof T]: Written<T[Key]> }
      : T;

/** A question to Prometheus: its own schema is not published. */
type Question = {
  refId: string;
  datasource: { type: "prometheus"; uid: string };
  expr: string;
  legendFormat?: string;
  editorMode?: "code" | "builder";
  format?: "time_series" | "table" | "heatmap";
  range?: boolean;
  instant?: boolean;
};

type Kind<Name extends string, Options, Custom> = Written<
  Omit<Panel, "type" | "options" | "fieldConfig" | "targets">
> & {
  type: Name;
  title: string;
  options: Written<Partial<Options>>;
  fieldConfig: {
    defaults: Written<Omit<FieldConfig, "custom">> & { custom?: Written<Custom> };
    overrides: [];
  };
  targets: Question[];
};

type Row = Written<RowPanel> & { type: "row"; title: string };

export type Board = Written<Omit<Dashboard, "panels">> & {
  uid: string;
  title: string;
  panels: (
    | Row
    | Kind<"heatmap", heatmap.Options, heatmap.FieldConfig>
    | Kind<"stat", stat.Options, never>
    | Kind<"timeseries", timeseries.Options, timeseries.FieldConfig>
  )[];
};

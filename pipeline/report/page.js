"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 600px)");
  const touched = matchMedia("(pointer: coarse)");
  const charts = [...document.querySelectorAll("script[data-chart]")].map((one) => ({
    element: document.getElementById(one.dataset.chart),
    figure: JSON.parse(one.textContent),
  }));

  // Put in the colours that page.css has by day or by night.
  const coloured = (value, css) => {
    if (typeof value === "string") {
      const name = /^var\((--[a-z]+)\)$/.exec(value);
      return name ? css.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((one) => coloured(one, css));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, coloured(one, css)]));
    }
    return value;
  };

  const draw = () => {
    const css = getComputedStyle(document.documentElement);
    const axis = (own) => ({
      gridcolor: "var(--line)", linecolor: "var(--line)", zerolinecolor: "var(--line)", automargin: true,
      nticks: narrow.matches ? 5 : 10, ...own,
      fixedrange: touched.matches || narrow.matches || Boolean(own.fixedrange),
    });
    return Promise.all(charts.map(({ element, figure }) => {
      const layout = {
        ...figure.layout,
        autosize: true,
        font: { color: "var(--ink)", size: narrow.matches ? 11 : 12, family: "system-ui, sans-serif" },
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        margin: { l: 8, r: 12, t: 34, b: 8, ...figure.layout.margin },
        dragmode: touched.matches || narrow.matches ? false : "zoom",
        legend: { orientation: "h", x: 0, xanchor: "left", y: 1, yanchor: "bottom", ...figure.layout.legend },
        hoverlabel: { bgcolor: "var(--card)", bordercolor: "var(--line)", font: { color: "var(--ink)" }, align: "left" },
        xaxis: axis(figure.layout.xaxis),
        yaxis: axis(figure.layout.yaxis),
      };
      return Plotly.react(element, coloured(figure.data, css), coloured(layout, css), {
        responsive: true, displayModeBar: false, doubleClick: "reset",
      });
    })).then(() => { document.documentElement.dataset.drawn = dark.matches ? "dark" : "light"; });
  };

  draw();
  dark.addEventListener("change", draw);
  narrow.addEventListener("change", draw);
})();

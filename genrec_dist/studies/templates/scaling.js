"use strict";
// Draws every figure of the page from the JSON beside it, in the page's colours; draws again when light and dark change.
const config = {
  responsive: true,
  displaylogo: false,
  modeBarButtons: [["toImage", "resetScale2d"]],
};
function drawAll() {
  const style = getComputedStyle(document.documentElement);
  for (const canvas of document.querySelectorAll(".canvas")) {
    const text = canvas.nextElementSibling.textContent.replace(/var\((--[a-z]+)\)/g, (_, name) =>
      style.getPropertyValue(name).trim(),
    );
    const spec = JSON.parse(text);
    const image = { format: "svg", filename: canvas.id };
    Plotly.react(canvas, spec.data, spec.layout, { ...config, toImageButtonOptions: image });
  }
}
drawAll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

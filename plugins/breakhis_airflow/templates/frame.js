// Airflow shows this page in a frame out of which no link may lead: neither to its own answer form nor to a window of its
// own, such as for a report. Its page around the frame may go there, so it is asked to.
document.addEventListener("click", event => {
  const link = event.target.closest("a[target]");
  if (!link || window === window.top) return;
  event.preventDefault();
  const outside = window.parent.document.createElement("a");
  outside.href = link.href;
  if (link.target === "_blank") Object.assign(outside, { target: "_blank", rel: "noopener" });
  outside.click();
});

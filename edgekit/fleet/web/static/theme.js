// The chosen theme, before the first paint; without a choice the system's.
const chosen = localStorage.getItem("edgekit-theme");
if (chosen) document.documentElement.dataset.theme = chosen;

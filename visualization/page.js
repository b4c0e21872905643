// Shows where the model looked for a word, in every .sat of the document. A notebook runs this once
// for each of its views, so views that were made ready before are left alone.
(() => {
  const FINE = 8; // pixels of the mask per cell; the browser blends between them
  const mask = document.createElement("canvas"), dim = document.createElement("canvas");

  // (side * FINE) rows of the share of each cell in each pixel along one edge; rows sum to 1. As in
  // visualize.py, neighbours blend with a standard deviation of half a cell.
  function blend(side) {
    return Array.from({ length: side * FINE }, (_, pixel) => {
      const weights = Array.from({ length: side }, (_, cell) =>
        Math.exp(-2 * ((pixel + 0.5) / FINE - cell - 0.5) ** 2));
      const sum = weights.reduce((a, b) => a + b);
      return weights.map((weight) => weight / sum);
    });
  }

  // Draws into `mask` how much each place is lit: as opacity, the brightest is opaque.
  function drawMask(alpha, side) {
    const shares = blend(side), size = side * FINE, light = [];
    for (const row of shares) {
      const blended = Array.from({ length: side }, (_, x) =>
        row.reduce((sum, share, y) => sum + share * alpha[y * side + x], 0));
      for (const column of shares) {
        light.push(column.reduce((sum, share, x) => sum + share * blended[x], 0));
      }
    }
    const largest = light.reduce((a, b) => Math.max(a, b)) || 1;
    mask.width = mask.height = size;
    const pixels = new ImageData(size, size);
    light.forEach((value, i) => { pixels.data[4 * i + 3] = Math.round(255 * value / largest); });
    mask.getContext("2d").putImageData(pixels, 0, 0);
  }

  // The photograph lit up where the mask is and a dark grey elsewhere: with light from 0 to 1,
  // light * (0.45 + 0.55 * photograph) + (1 - light) * 0.25 * grey, as visualize.py draws it.
  function drawOverlay(canvas, photograph) {
    const width = photograph.naturalWidth, height = photograph.naturalHeight;
    function layer(context, operation, what) {
      context.globalCompositeOperation = operation;
      if (typeof what === "string") {
        context.fillStyle = what;
        context.fillRect(0, 0, width, height);
      } else {
        context.drawImage(what, 0, 0, width, height);
      }
    }
    dim.width = canvas.width = width;
    dim.height = canvas.height = height;
    const dark = dim.getContext("2d"), lit = canvas.getContext("2d");
    layer(dark, "source-over", photograph);
    layer(dark, "saturation", "#000"); // grey
    layer(dark, "source-over", "rgb(0 0 0 / 75%)");
    lit.imageSmoothingQuality = "high";
    layer(lit, "source-over", photograph);
    layer(lit, "source-over", "rgb(255 255 255 / 45%)");
    layer(lit, "destination-in", mask);
    layer(lit, "destination-over", dim);
  }

  function makeReady(root) {
    const side = Number(root.dataset.side);
    const attention = Uint8Array.from(atob(root.dataset.attention), (c) => c.charCodeAt(0));
    const list = root.querySelector(".sat-words"), words = [...root.querySelectorAll(".sat-word")];
    const photograph = root.querySelector("img"), canvas = root.querySelector("canvas");
    const status = root.querySelector(".sat-where");
    // Indices of words, -1 for none. What the mouse is over is shown until it leaves; what was
    // tapped, clicked or reached with keys stays.
    let hovered = -1, selected = -1, before = -1;

    function update() {
      const shown = hovered >= 0 ? hovered : selected;
      words.forEach((word, i) => {
        word.classList.toggle("sat-shown", i === shown);
        word.setAttribute("aria-selected", String(i === selected));
      });
      root.classList.toggle("sat-looking", shown >= 0);
      status.textContent = shown < 0 ? status.dataset.hint
        : `${words[shown].textContent}: ${words[shown].dataset.where}`;
      if (shown < 0) return;
      if (!photograph.naturalWidth) { // not there yet
        photograph.addEventListener("load", update, { once: true });
        return;
      }
      drawMask(attention.subarray(shown * side * side, (shown + 1) * side * side), side);
      drawOverlay(canvas, photograph);
    }

    function select(i) {
      selected = i;
      if (i >= 0) words.forEach((word, j) => { word.tabIndex = i === j ? 0 : -1; });
      update();
    }

    function showPhotograph() {
      hovered = -1;
      select(-1);
    }

    const indexOf = (event) => words.indexOf(event.target.closest(".sat-word"));

    if (!list) return; // a caption without words
    list.addEventListener("pointerover", (event) => {
      // A finger hovers over nothing. Between two words the first stays, so that nothing flickers.
      if (event.pointerType === "touch" || indexOf(event) < 0) return;
      hovered = indexOf(event);
      update();
    });
    list.addEventListener("pointerleave", () => {
      hovered = -1;
      update();
    });
    list.addEventListener("focusin", (event) => select(indexOf(event)));
    // A second tap on a word takes its selection back; focus comes between, so remember.
    list.addEventListener("pointerdown", () => { before = selected; });
    list.addEventListener("click", (event) => {
      if (indexOf(event) >= 0) select(indexOf(event) === before ? -1 : indexOf(event));
      before = -1;
    });
    list.addEventListener("keydown", (event) => {
      const at = indexOf(event), next = getComputedStyle(list).direction === "rtl" ? -1 : 1;
      const to = { ArrowRight: at + next, ArrowLeft: at - next, Home: 0, End: words.length - 1 }[
        event.key];
      if (to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      event.stopPropagation(); // from a notebook, which has arrow keys of its own
      hovered = -1;
      const word = Math.min(Math.max(to, 0), words.length - 1);
      words[word].focus();
      select(word);
    });
    canvas.addEventListener("click", showPhotograph);
    document.addEventListener("keydown", function escape(event) {
      // A cell that is run again leaves a view behind that nobody sees.
      if (!root.isConnected) document.removeEventListener("keydown", escape);
      else if (event.key === "Escape") showPhotograph();
    });
    update();
  }

  for (const root of document.querySelectorAll(".sat")) {
    if (!root.satReady) {
      root.satReady = true;
      makeReady(root);
    }
  }
})();

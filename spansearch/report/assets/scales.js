// From values to pixels, with ticks.

function linear([low, high], [from, to]) {
  if (high <= low) high = low + (Math.abs(low) || 1);
  const at = (value) => from + ((value - low) / (high - low)) * (to - from);
  return { at, low, high, ticks: (n) => steps(low, high, n), words: (value) => significant(value) };
}

function steps(low, high, n) {
  const raw = (high - low) / Math.max(1, n);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * ([1, 2, 5].find((k) => k * power >= raw) ?? 10);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) {
    found.push(Number((k * step).toPrecision(12)));
  }
  return found;
}

// Zero and less lie on a line of their own, below the smallest value above it.
function logarithmic(values, [from, to]) {
  const above = values.filter((value) => value > 0);
  const zero = values.some((value) => value <= 0);
  const least = above.length ? Math.min(...above) : 1e-3;
  const most = above.length ? Math.max(...above) : 1;
  const floor = Math.log10(least) - 0.05;
  const top = Math.max(floor + 0.3, Math.log10(most) + 0.05);
  const bottom = zero ? floor - 0.12 * (top - floor) : floor;
  const at = (value) => from + (((value > 0 ? Math.log10(value) : bottom) - bottom) / (top - bottom)) * (to - from);
  const ticks = (n) => {
    const found = zero ? [0] : [];
    const every = Math.max(1, Math.ceil((top - floor) / n));
    for (let k = Math.ceil(floor); k <= top; k += every) found.push(10 ** k);
    if (found.length < (zero ? 3 : 2)) {
      for (const part of [2, 5]) {
        for (let k = Math.floor(floor); k <= top; k++) {
          const value = part * 10 ** k;
          if (Math.log10(value) >= floor && Math.log10(value) <= top) found.push(value);
        }
      }
    }
    return found.sort((a, b) => a - b);
  };
  return { at, low: 10 ** floor, high: 10 ** top, ticks, words: (value) => (value > 0 ? significant(value, 1) : "0") };
}

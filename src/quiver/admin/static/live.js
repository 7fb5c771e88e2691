// The server's counters, asked for while somebody looks; what is shown is what they grew by.

import { call } from "./api.js";

export const EVERY_MS = 2000;
const KEPT = 150; // five minutes
const WINDOW = 30; // one minute

class Live extends EventTarget {
  samples = [];
  error = null;
  #timer = null;
  #asking = false;

  get now() {
    return this.samples.at(-1) ?? null;
  }

  start() {
    document.addEventListener("visibilitychange", () => (document.hidden ? this.pause() : this.ask()));
    return this.ask();
  }

  pause() {
    clearTimeout(this.#timer);
    this.#timer = null;
  }

  async ask() {
    this.pause();
    if (this.#asking) return;
    this.#asking = true;
    try {
      const status = await call("status");
      if (this.now && status.started_at !== this.now.started_at) this.samples = []; // another process: its counters begin anew
      this.samples.push(status);
      this.samples.splice(0, this.samples.length - KEPT);
      this.error = null;
    } catch (error) {
      this.error = error;
    } finally {
      this.#asking = false;
    }
    this.dispatchEvent(new Event("change"));
    const isLocked = this.error && (this.error.status === 401 || this.error.status === 403);
    if (!document.hidden && !isLocked) this.#timer = setTimeout(() => this.ask(), EVERY_MS);
  }
}

export const live = new Live();

// Let a page be told of each sample for as long as it is shown.
export function watch(signal, tell) {
  live.addEventListener("change", () => tell(live.now), { signal });
  if (live.now) tell(live.now);
}

const tokensOf = (status) => status.models.reduce((sum, model) => sum + model.tokens, 0);
const requestsOf = (status) => status.dialects.reduce((sum, row) => sum + row.answered + row.refused + row.failed, 0);
const hitsOf = (status) => (status.figures.quiver_cache_hits ?? 0) + (status.figures.quiver_repeated_inputs ?? 0);
const askedOf = (status) => hitsOf(status) + (status.figures.quiver_cache_misses ?? 0);

function rate(read, before, after) {
  const time = after.unix - before.unix;
  return time > 0 ? (read(after) - read(before)) / time : 0;
}

function series(read) {
  const { samples } = live;
  return samples.slice(1).map((after, i) => [after.unix, rate(read, samples[i], after)]);
}

export function tokensPerSecond(id) {
  const read = id ? (status) => status.models.find((model) => model.id === id)?.tokens ?? 0 : tokensOf;
  return series(read);
}

export function requestsPerSecond() {
  return series(requestsOf);
}

// Counts above `before`, as a cumulative histogram; without it, since the start.
function grown(before, after) {
  if (!before) return after.latency;
  const had = new Map(before.latency.bounds.map((bound, i) => [bound, before.latency.counts[i]]));
  return { bounds: after.latency.bounds, counts: after.latency.counts.map((count, i) => count - (had.get(after.latency.bounds[i]) ?? 0)) };
}

// As Prometheus does: even within a bucket. The last bound is null: infinity.
export function quantile({ bounds, counts }, part) {
  const total = counts.at(-1) ?? 0;
  if (!total) return NaN;
  const wanted = part * total;
  const i = counts.findIndex((count) => count >= wanted);
  const low = i > 0 ? bounds[i - 1] : 0;
  const below = i > 0 ? counts[i - 1] : 0;
  if (bounds[i] === null) return low;
  return low + ((wanted - below) / Math.max(counts[i] - below, 1e-9)) * (bounds[i] - low);
}

// Percentiles of the last minute; of all time where that had no request.
export function latency() {
  const { samples, now } = live;
  if (!now) return null;
  const before = samples.length > 1 ? samples[Math.max(0, samples.length - 1 - WINDOW)] : null;
  const lately = grown(before, now);
  const isLately = before !== null && (lately.counts.at(-1) ?? 0) > 0;
  const histogram = isLately ? lately : now.latency;
  return { isLately, p50: quantile(histogram, 0.5), p95: quantile(histogram, 0.95), p99: quantile(histogram, 0.99) };
}

export function latencySeries(part) {
  const { samples } = live;
  return samples.slice(1).map((after, i) => [after.unix, quantile(grown(samples[Math.max(0, i - 4)], after), part) || 0]);
}

export function hitRate() {
  const { samples, now } = live;
  if (!now) return null;
  const before = samples[Math.max(0, samples.length - 1 - WINDOW)];
  const asked = askedOf(now) - askedOf(before);
  return {
    lately: asked ? (hitsOf(now) - hitsOf(before)) / asked : NaN,
    ever: askedOf(now) ? hitsOf(now) / askedOf(now) : NaN,
    entries: now.figures.quiver_cache_entries ?? 0,
    bytes: now.figures.quiver_cache_bytes ?? 0,
    isOn: "quiver_cache_entries" in now.figures,
  };
}

export function queueSeries() {
  return live.samples.map((status) => [status.unix, status.models.reduce((sum, model) => sum + model.waiting_tokens, 0)]);
}

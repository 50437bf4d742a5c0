// What anywidget calls: a store for each model, a view for each place that shows it.
import { Store } from "./store.js";
import { createView } from "./view.js";

/** @type {Map<string, Store>} by the widget's id: anywidget gives each call another face of the same model */
const stores = new Map();

export default {
  /** @param {{model: any}} context */
  initialize({ model }) {
    const { id } = model.get("_facts");
    const store = new Store(model);
    stores.set(id, store);
    return () => {
      store.close();
      if (stores.get(id) === store) stores.delete(id);
    };
  },
  /** @param {{model: any, el: HTMLElement}} context */
  render({ model, el }) {
    return createView(model, el, stores.get(model.get("_facts").id));
  },
};

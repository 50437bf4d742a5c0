//! Rows and facts as numpy arrays and dicts, in the shapes that users know.

use expert_lens_arena::{Facts, Way};
use half::f16;
use numpy::{Element, PyArray1, PyArrayMethods, PyReadonlyArray};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// An array's values, in their order in memory.
///
/// # Errors
/// ValueError for an array with gaps or another order.
pub fn contiguous<'a, T: Element, D: numpy::ndarray::Dimension>(
    name: &str,
    array: &'a PyReadonlyArray<'_, T, D>,
) -> PyResult<&'a [T]> {
    array.as_slice().map_err(|_| PyValueError::new_err(format!("{name} is not C-contiguous; copy it first")))
}

/// Expert ids in native byte order as [n, L, K], u8 or u16.
pub fn experts<'py>(py: Python<'py>, facts: &Facts, bytes: Vec<u8>) -> PyResult<Bound<'py, PyAny>> {
    let shape = [bytes.len() / facts.row_bytes(), facts.layers.len(), facts.top_k as usize];
    if facts.id_bytes() == 1 {
        Ok(PyArray1::from_vec(py, bytes).reshape(shape)?.into_any())
    } else {
        Ok(PyArray1::from_vec(py, bytemuck::allocation::pod_collect_to_vec::<u8, u16>(&bytes))
            .reshape(shape)?
            .into_any())
    }
}

/// Router weights as f16 [n, L, K], or None if the arena has none.
pub fn weights<'py>(py: Python<'py>, facts: &Facts, weights: Vec<u16>) -> PyResult<Option<Bound<'py, PyAny>>> {
    if !facts.weights {
        return Ok(None);
    }
    let shape = [weights.len() / facts.ids_per_row(), facts.layers.len(), facts.top_k as usize];
    let weights: Vec<f16> = bytemuck::allocation::cast_vec(weights);
    Ok(Some(PyArray1::from_vec(py, weights).reshape(shape)?.into_any()))
}

/// What a capture says of its model, as a dict.
pub fn facts<'py>(py: Python<'py>, capture: &str, facts: &Facts) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("capture", capture)?;
    dict.set_item("rank", facts.rank)?;
    dict.set_item("layers", &facts.layers)?;
    dict.set_item("num_experts", facts.num_experts)?;
    dict.set_item("top_k", facts.top_k)?;
    dict.set_item("weights", facts.weights)?;
    dict.set_item("engine", &facts.engine)?;
    dict.set_item("engine_version", &facts.engine_version)?;
    dict.set_item("model", &facts.model)?;
    Ok(dict)
}

/// How records are published, in a word.
pub fn way(way: Option<Way>) -> &'static str {
    match way {
        None => "host",
        Some(Way::Graph) => "graph",
        Some(Way::GraphAndEvent) => "graph and event",
        Some(Way::Stream) => "stream",
        Some(Way::Event) => "event",
    }
}

//! Pipeline stages: publishers that have each a part of the model's routed layers, and run the same forwards.

use crate::error::{Error, Result};
use crate::layout::Facts;
use std::ops::Range;

/// What all stages of a capture have together.
#[derive(Clone, Debug)]
pub(super) struct Stages {
    /// Of the whole model: the layers of all stages.
    pub whole: Facts,
    /// The layers of each stage, as indices into those of the whole model.
    parts: Vec<Range<usize>>,
}

/// The part of the model that one arena has.
#[derive(Clone, Debug)]
pub(super) struct Part {
    /// What the arena says.
    pub facts: Facts,
    /// Which stage it is.
    pub stage: usize,
    /// Its first layer, as an index into those of the whole model.
    pub first_layer: usize,
    /// How many stages there are.
    pub stages: usize,
}

impl Part {
    /// Whether it is of the stage that tells of requests and is counted by: every one has the same forwards.
    pub fn is_first(&self) -> bool {
        self.stage == 0
    }

    /// Which replica of the model it is of.
    pub fn replica(&self) -> u32 {
        self.facts.rank / self.stages as u32
    }

    /// Whether the model has no other stage.
    pub fn is_whole(&self) -> bool {
        self.stages == 1
    }

    /// A bit for each stage whose part of a row is there.
    pub fn bit(&self) -> u32 {
        1 << self.stage
    }

    /// The bits of a row that is whole.
    pub fn all(&self) -> u32 {
        u32::MAX >> (u32::BITS - self.stages as u32)
    }
}

impl Stages {
    /// The stages of a capture whose arenas say this.
    ///
    /// # Errors
    /// If a stage is missing, or their layers are not one behind the other.
    pub fn of(capture: &str, arenas: &[&Facts]) -> Result<Self> {
        let first = arenas[0];
        let stages = first.other_stages as usize + 1;
        let mut layers: Vec<&[u16]> = arenas.iter().map(|facts| facts.layers.as_slice()).collect();
        layers.sort_unstable();
        layers.dedup();
        if stages == 1 {
            layers.truncate(1); // others are refused one by one
            layers[0] = &first.layers;
        } else if layers.len() < stages {
            return Err(Error::invalid(format!(
                "capture '{capture}' has {} of {stages} pipeline stages so far; attach again when its engine has started",
                layers.len()
            )));
        }
        let joined = layers.concat();
        if layers.len() > stages || !joined.is_sorted_by(|one, next| one < next) {
            return Err(Error::invalid(format!(
                "the publishers of capture '{capture}' have the layers {layers:?}, which are not those of {stages} pipeline \
                 stages, one behind the other"
            )));
        }
        let mut at = 0;
        let range = |part: &&[u16]| {
            at += part.len();
            at - part.len()..at
        };
        let parts = layers.iter().map(range).collect();
        Ok(Self { parts, whole: Facts { layers: joined, ..first.clone() } })
    }

    /// Of each stage, in order.
    pub fn facts(&self) -> impl Iterator<Item = Facts> {
        let layers = |part: &Range<usize>| self.whole.layers[part.clone()].to_vec();
        self.parts.iter().map(move |part| Facts { layers: layers(part), ..self.whole.clone() })
    }

    /// Which part an arena of the capture has.
    ///
    /// # Errors
    /// If it has none of them, or is of another model.
    pub fn part(&self, capture: &str, facts: &Facts) -> Result<Part> {
        let shape = |facts: &Facts| (facts.num_experts, facts.top_k, facts.weights, facts.other_stages);
        let stage = self.parts.iter().position(|part| self.whole.layers[part.clone()] == facts.layers);
        match stage {
            Some(stage) if shape(facts) == shape(&self.whole) => {
                let (first_layer, stages) = (self.parts[stage].start, self.parts.len());
                Ok(Part { facts: facts.clone(), stage, first_layer, stages })
            }
            _ => Err(Error::invalid(format!(
                "rank {} of capture '{capture}' has other routed layers, experts or top-k than rank {}, and is no pipeline \
                 stage beside it; they cannot be watched together",
                facts.rank, self.whole.rank
            ))),
        }
    }
}

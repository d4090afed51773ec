// The plan of one mlp_adapt call: the form of each layer by a cost model, and where everything lies.
#pragma once

#include <vector>

#include "core/mlp_adapt_plan.h"

namespace mtml {

struct OwnedPlan {
  MlpPlan plan{};
  std::vector<MlpLayer> layers;
  std::vector<Place> places;
  int64_t num_elements = 0;
};

// The form of one layer.
struct LayerChoice {
  Form form;
  bool query_dense;

  bool operator==(const LayerChoice& other) const { return form == other.form && query_dense == other.query_dense; }
};

// What the plan depends on besides the options.
struct PlanRequest {
  MlpOptions options;
  std::vector<bool> moves, per_task, rate_by_element;  // of each parameter
  int64_t support_rows, query_rows;                    // of the largest task
  int64_t tasks, all_support_rows, all_query_rows;     // of those that share the plan
  bool wants_fast, wants_rates, wants_support_x, wants_query_x;
  int64_t rate_rows;  // of rates by element: 1 or K; 0 where their gradient is not wanted
  int64_t element_bytes;
  int64_t lanes, panel;
  int64_t (*packed_size)(int64_t k, int64_t n);
};

// The forms that suit a task of so many support and query rows. They depend on nothing else of the batch: a task alone
// has the same bits as in any company.
std::vector<LayerChoice> choose_forms(const PlanRequest& request, int64_t support_rows, int64_t query_rows);

OwnedPlan make_plan(const PlanRequest& request, const std::vector<LayerChoice>& forms);

}  // namespace mtml

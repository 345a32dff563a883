"""From policy to task graph, in small passes: order, pools, slots, edges."""
